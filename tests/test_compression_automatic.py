"""Which rules come of a budget where GPTQ shall round: what is tried, and what is done."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.compression import automatic, calibrated_leaf
from lepton_jax.compression.automatic import Automatic
from lepton_jax.compression.calibrate import Options, require_methods
from lepton_jax.compression.presets import scheme_of_each
from lepton_jax.compression.rules import weights_of
from lepton_jax.compression.scheme import Scheme
from lepton_jax.models.build import abstract_model

INT8 = Scheme(rounding="gptq")
INT4 = Scheme("int4", group=8, rounding="gptq")
PAIR = Automatic(bytes=0.2, candidates=(INT8, INT4, Scheme(group=8)))


def test_what_gptq_rounds_is_tried_rounded_to_nearest():
    assert PAIR.tried == (Scheme(), Scheme("int4", group=8), Scheme(group=8))
    with pytest.raises(ValueError, match="compression.candidates holds .* keep one of them"):
        Automatic(bytes=0.2, candidates=(INT8, Scheme()))


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_gets_its_candidate_but_what_is_only_looked_up(tied):
    model, _ = tiny("llama", layers=2)
    config = dataclasses.replace(model.config, tie_embeddings=tied)
    model = abstract_model(config, jnp.float32, jnp.float32)
    paths = weights_of(model.specs)
    chosen = np.arange(len(paths)) % 2
    rules = PAIR.rules(model, chosen, Options())
    require_methods(model, rules, Options())
    found = scheme_of_each(rules, model.specs)
    for path, index in zip(paths, chosen, strict=True):
        looked_up = path == "embed" and not tied
        assert found[path] == (PAIR.tried if looked_up else PAIR.candidates)[index]


def test_experts_whose_hessians_are_too_large_are_rounded_to_nearest(monkeypatch):
    model, _ = tiny("mixtral", layers=2)
    paths = weights_of(model.specs)
    sizes = {p: model.specs[p].shape for p in paths if ".experts_" in p}
    sizes = {path: 4 * shape[0] * shape[-1] ** 2 for path, shape in sizes.items()}
    assert len(set(sizes.values())) == 2  # of the inputs of down, and of gate and up
    monkeypatch.setattr(calibrated_leaf, "MOST_HESSIANS", min(sizes.values()))
    found = scheme_of_each(PAIR.rules(model, [0] * len(paths), Options()), model.specs)
    for path, scheme in found.items():
        nearest = path == "embed" or sizes.get(path, 0) > min(sizes.values())
        assert scheme == (Scheme() if nearest else INT8), path


def test_an_embedding_that_smoothing_would_clip_is_rounded_to_nearest():
    model, _ = tiny("mixtral", layers=2)
    candidates = (Scheme("int4", group=8, rounding="mse"), Scheme(rounding="mse"))
    options, asked = Options(smooth="awq"), Automatic(bytes=0.2, candidates=candidates)
    paths = weights_of(model.specs)
    rules = asked.rules(model, [1] * len(paths), options)
    require_methods(model, rules, options)
    assert scheme_of_each(rules, model.specs)["embed"] == Scheme()


@pytest.mark.parametrize(
    ("windows", "seen"),
    [((8, 256), (8, 256)), ((64, 512), (16, 256)), ((17, 256), (9, 256)), ((3, 4000), (3, 256))],
)
def test_long_texts_are_tried_in_part(windows, seen):
    tokens = np.arange(np.prod(windows)).reshape(windows)
    few = automatic._few(tokens)
    assert few.shape == seen
    assert few[0, 0] == 0 and few[-1, 0] >= tokens[windows[0] // 2, 0]  # of the whole text
