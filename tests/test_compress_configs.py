"""The recipes that ship: each holds rules that fit the models it is meant for."""

import dataclasses
import runpy
from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny_models
from compress_makers import model_folder

from lepton_jax import cli
from lepton_jax.checkpoints.load import load
from lepton_jax.compression.presets import scheme_of_each
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import RunConfig, recipe_sections
from lepton_jax.jobs.compress_inputs import require_fit
from lepton_jax.models.build import abstract_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/compress_*.py")), ids=lambda f: f.stem)
def test_shipped_configs_hold_recipes_that_fit(file, model):
    made = runpy.run_path(str(file))["get_config"]("a model")
    settings = cli.run_config(cli.whole_config(made))
    assert settings.model.path == "a model"
    sections = [recipe_sections(*recipe)[0] for recipe in settings.sweep.recipes.items()]
    specs = load(model).model.specs
    weights = {path for path, spec in specs.items() if spec.inputs}
    for section in sections or [settings.compression]:
        recipe = Recipe.from_config(section)
        named = set(scheme_of_each(recipe.rules, specs))
        assert named == (weights if recipe.rules else set())
        measured = bool(recipe.structure or recipe.automatic)
        assert bool(recipe.calibrated) == measured or any(
            word in repr(section) for word in ("gpt", "wanda", "'awq", "smoothq", "static")
        )


def sized(case, layers=12, **sizes):
    """The config of a tiny model's family with other sizes."""
    config = tiny_models.read_config(case)
    windows, ropes = (values * layers for values in (config.layer_windows, config.layer_ropes))
    of_layers = {"layer_windows": windows[:layers], "layer_ropes": ropes[:layers]}
    return dataclasses.replace(config, num_layers=layers, **of_layers, **sizes)


@pytest.mark.parametrize("name", ["auto", "speed", "sweep"])
def test_shipped_recipes_fit_the_demo_models(name):
    """In bfloat16: SmolLM2-135M, here with a head of its own, and Gemma 3 270M."""
    wide = dict(vocab_size=49152, hidden_size=576, ffn_size=1536, num_heads=9, num_kv_heads=3)
    flat = dict(vocab_size=262144, hidden_size=640, ffn_size=2048, num_heads=4, num_kv_heads=1)
    models = [
        abstract_model(config, jnp.bfloat16, jnp.bfloat16)
        for config in (sized("llama", head_dim=64, **wide), sized("gemma3", head_dim=256, **flat))
    ]
    assert [model.config.tie_embeddings for model in models] == [False, True]
    made = runpy.run_path(str(ROOT / f"configs/compress_{name}.py"))["get_config"]()
    settings = cli.run_config(cli.whole_config(made))
    sections = [recipe_sections(*item) for item in settings.sweep.recipes.items()]
    for compression, recovery, _ in sections or [(settings.compression, settings.recovery, None)]:
        asked = dataclasses.replace(settings, recovery=recovery)
        for model in models:
            require_fit(asked, Recipe.from_config(compression), model)


def test_the_shipped_static_recipes_fit_experts():
    made = runpy.run_path(str(ROOT / "configs/compress_sweep.py"))["get_config"]()
    model = tiny_models.with_tokens("mixtral")[0]
    for name in ("w8a8-static", "w8a8-smoothquant"):
        section, *_ = recipe_sections(name, made["sweep"]["recipes"][name])
        recipe = Recipe.from_config(section)
        require_fit(RunConfig(), recipe, model)
        schemes = scheme_of_each(recipe.rules, model.specs)
        static = {path for path, scheme in schemes.items() if scheme.activations == "static"}
        assert static and not any(".experts_" in path for path in static)
