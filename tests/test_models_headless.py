"""Models without an output head, as embedding models are saved: they embed as with it, and say what
they can't do. The oracle is the same untied model with its head, which no embedding looks at.
"""

import dataclasses
import json

import checkpoint_makers as make
import numpy as np
import pytest
from compress_makers import model_folder
from published_configs import PUBLISHED
from safetensors.numpy import load_file

from lepton_jax import LeptonEngine, LeptonOptimizer, SamplingParams, compress
from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.load import describe, identify, load
from lepton_jax.checkpoints.manifest import Manifest
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.config import (
    CalibrationSection,
    CompressionSection,
    EngineSection,
    ModelSection,
    PlanSection,
    ReceiptSection,
    RunConfig,
)
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.scored import ScoreSpec, Scoring
from lepton_jax.models.registry import config_from_hf
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.planning.plan import make_plan

SECTION = EngineSection(rows=2, max_len=64, prefill_chunk=32, page_size=16)
TEXTS = ["Lovely soup!", "a kettle", "The sun is a star, and so are others"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("whole") / "model", layers=1)


def without_head(whole, folder, *, prefix="model.", architecture="LlamaForCausalLM"):
    """A copy as embedding models are saved."""
    arrays = load_file(whole / "model.safetensors")
    arrays.pop("lm_head.weight")
    arrays = {prefix + name.removeprefix("model."): array for name, array in arrays.items()}
    config = json.loads((whole / "config.json").read_text())
    make.hf_folder(folder, arrays, **config | {"architectures": [architecture]})
    (folder / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def headless(whole, tmp_path_factory):
    return without_head(whole, tmp_path_factory.mktemp("headless") / "model", prefix="")


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel"])
def test_all_but_the_head_is_loaded(whole, tmp_path, prefix, architecture):
    folder = without_head(whole, tmp_path / "m", prefix=prefix, architecture=architecture)
    found, expected = load(folder), load(whole)
    leaves = dict(zip(expected.model.specs, expected.leaves, strict=True))
    head = leaves.pop("head")
    assert list(found.model.specs) == list(leaves) == list(describe(folder).specs)
    for path, leaf in zip(found.model.specs, found.leaves, strict=True):
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)
    assert found.bytes == expected.bytes - head.nbytes


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_a_config_learns_of_the_head_from_the_names_of_the_tensors(architecture):
    values = PUBLISHED["qwen3-0.6b"] | {"architectures": [architecture]}
    untied = values | {"tie_word_embeddings": False}
    body = ["embed_tokens.weight", "norm.weight"]
    assert config_from_hf(untied, body).head_path == ""
    assert config_from_hf(untied, [*body, "lm_head.weight"]).head_path == "head"
    assert config_from_hf(untied).head_path == "head"  # nobody has looked
    assert config_from_hf(values, body).head_path == "embed"


def test_another_weight_is_still_missed(whole, tmp_path):
    arrays = load_file(whole / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        arrays.pop(name)
    folder = make.hf_folder(tmp_path / "m", arrays, vocab_size=260, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight\. The config"):
        load(folder)


def embedded(path, **options):
    with LeptonEngine() as lepton:
        lepton.load_model(path, config=RunConfig(engine=SECTION), **options)
        ranking = lepton.rank("soup", TEXTS, rank_by="similarity")
        return lepton.embed(TEXTS), lepton.embed(TEXTS, pooling="mean", layer=0), ranking


@pytest.mark.parametrize("preset", ["none", "w8a8"])
def test_embeddings_are_those_of_the_model_with_its_head(whole, headless, preset):
    found = embedded(headless, compression=preset)
    expected = embedded(whole, compression=preset)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_what_needs_a_head_is_refused(headless):
    with LeptonEngine() as lepton:
        lepton.load_model(headless, config=RunConfig(engine=SECTION))
        for ask in (
            lambda: lepton.generate(TEXTS),
            lambda: list(lepton.stream(TEXTS)),
            lambda: lepton.score([("Lovely", " soup!")]),
            lambda: lepton.predict(TEXTS, ["good", "bad"]),
            lambda: lepton.rank("soup", TEXTS, rank_by="likelihood"),
        ):
            with pytest.raises(ValueError, match="the model has no output head.*job.mode=embed"):
                ask()
        assert lepton.embed(TEXTS).shape == (3, make.D)
        work = [(8, SamplingParams())]
        with pytest.raises(ValueError, match=f"^{headless} has no output head"):
            lepton.start(workload=work)
        lepton.start(workload=[(8, ScoreSpec(pool=True))])


def test_no_program_of_logits_is_asked_for(headless, whole):
    loaded = load(headless)
    engine = Engine(loaded.model, loaded.leaves, section=SECTION)
    with pytest.raises(ValueError, match="the model has no output head"):
        engine.warm_up([(8, ScoreSpec(targets=1))])
    section = dataclasses.replace(SECTION, speculation="draft")
    dense = load(whole)
    engine = Engine(dense.model, dense.leaves, section=section)
    with pytest.raises(ValueError, match="the draft model has no output head"):
        engine.draft_with(loaded.model, loaded.leaves)


def test_it_is_compressed_without_measuring_predictions(headless, tmp_path):
    blind = RunConfig(receipt=ReceiptSection(compare=False))
    with pytest.raises(ValueError, match=f"{headless} has no output head, and receipt.compare"):
        compress(headless, tmp_path / "small", preset="int8")
    automatic = CompressionSection(auto_bytes=0.5)
    with pytest.raises(ValueError, match="no output head, and compression.auto_bytes"):
        compress(headless, tmp_path / "s", config=dataclasses.replace(blind, compression=automatic))
    compress(headless, tmp_path / "small", preset="int8", config=blind)
    np.testing.assert_array_equal(
        embedded(tmp_path / "small")[0], embedded(headless, compression="int8")[0]
    )


def test_recovery_and_plans_refuse_it(headless, tmp_path):
    with pytest.raises(ValueError, match="the model has no output head"):
        text = CalibrationSection(window_tokens=32)
        LeptonOptimizer().recover(headless, headless, windows=2, held_out=1, calibration=text)
    save(tmp_path / "saved", load(headless))
    config = RunConfig(
        model=ModelSection(path=str(tmp_path / "saved")), plan=PlanSection(compile=False)
    )
    with pytest.raises(ValueError, match="saved has no output head"):
        make_plan(config)


def test_tuning_measures_no_divergence_of_it(headless, tmp_path):
    config = RunConfig(model=ModelSection(path=str(headless)), engine=SECTION)
    request = SampledRequest((1, 2, 3), Scoring(pool="last"))
    with pytest.raises(ValueError, match=f"max_kl=0.1 is of predictions, and {headless} has no"):
        LeptonOptimizer(max_kl=0.1, directory=tmp_path).search(config, [request] * 4)


def test_saved_ones_come_back_and_others_are_as_before(headless, whole, tmp_path):
    save(tmp_path / "headless", load(headless))
    found = load(tmp_path / "headless")
    assert not found.config.head_path and found.config == load(headless).config
    save(tmp_path / "whole", load(whole))
    # As older releases wrote and read it: directories and fingerprints of models with heads stay.
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert "has_head" not in manifest["config"]
    assert Manifest.read(tmp_path / "whole" / "manifest.json").config.head_path == "head"
    assert identify(make.hf_folder(tmp_path / "old")) == "c0707a4859a2f4e3"
