"""Experts spread over devices (`mesh.expert`): the tokens of one device, each device's experts and
no others, no collective more, and what can't be spread.
"""

import re

import jax
import numpy as np
import pytest
import tiny_models

from lepton_jax.checkpoints import orbax_store
from lepton_jax.checkpoints.load import load
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection, MeshSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.sharding import MeshAxis, Placement, grid_of
from lepton_jax.sharding.partition import check_experts

SECTION = EngineSection(rows=4, page_size=8, prefill_chunk=32, decode_block=4, max_len=64)
FOLDER = tiny_models.FOLDER


def grid(count, expert):
    return grid_of(jax.devices()[:count], expert)


def answers(loaded):
    """Tokens of a few rows, on the devices where the model is, and the engine."""
    engine, draw = Engine(loaded.model, loaded.leaves, section=SECTION), np.random.default_rng(0)
    return _run(engine, *(draw.integers(3, 70, 4 + 5 * n).tolist() for n in range(6))), engine


def _run(engine, *prompts):
    told = {f"{n}": [] for n in range(len(prompts))}
    for name, prompt in zip(told, prompts, strict=True):
        engine.add_request(name, prompt, SamplingParams(max_tokens=10, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            told[output.request_id] += output.token_ids
    return told


def of_preset(case, preset):
    """The argument `compress` of `load`."""
    return compressor(preset_rules(preset), load(FOLDER / case).model.specs) if preset else None


# Whole experts and halves of them; one expert on each of five devices.
@pytest.mark.parametrize(
    ("case", "preset", "count", "expert"),
    [("mixtral", "", 4, 2), ("qwen3_moe", "int8", 5, 5)],
)
def test_tokens_of_one_device(case, preset, count, expert):
    compress = of_preset(case, preset)
    alone, _ = answers(load(FOLDER / case, compress=compress))
    shared = load(FOLDER / case, compress=compress, devices=grid(count, expert))
    told, engine = answers(shared)
    assert told == alone
    axis = engine.runner.placement.axis
    assert (axis.size, axis.spread) == (count, expert)
    assert len(engine.runner.model.runs) == 1
    for program in engine.runner.programs.compiled.values():
        found = re.findall(r"\s(all-\w+|collective-\w+|reduce-scatter)\(", program.as_text())
        # Two in the loop over layers; one for the embedding, the best logit and its first id.
        assert found == ["all-reduce"] * (2 + 3)


def test_a_device_gets_its_experts_and_all_routes(tmp_path):
    whole = load(FOLDER / "mixtral", compress=of_preset("mixtral", "int8"))
    orbax_store.save(tmp_path / "saved", whole)
    stored = load(tmp_path / "saved", devices=grid(4, 2))
    streamed = load(FOLDER / "mixtral", compress=of_preset("mixtral", "int8"), devices=grid(4, 2))
    for shared in (stored, streamed):
        leaves = dict(zip(shared.model.specs, shared.leaves, strict=True))
        dense = dict(zip(whole.model.specs, whole.leaves, strict=True))
        for n, device in enumerate(jax.devices()[:4]):
            experts, half = slice(n // 2 * 2, n // 2 * 2 + 2), slice(n % 2 * 12, n % 2 * 12 + 12)
            for name, cut in (("gate_up", (experts, slice(None), half)), ("down", (experts,))):
                path = f"layers.1.experts_{name}"
                parts = {s.device: s.data for s in leaves[path].values.addressable_shards}
                want = np.asarray(dense[path].values)[cut]
                want = want[..., half] if name == "down" else want
                np.testing.assert_array_equal(parts[device], want)
        router = leaves["layers.0.router"].addressable_shards
        assert {s.data.shape for s in router} == {(4, 32)} and len(router) == 4


def test_one_device_with_all_the_visits():
    """However uneven the visits are, none is dropped."""
    told = []
    for devices in (grid(1, 1), grid(4, 2)):
        loaded = load(FOLDER / "mixtral", devices=devices)
        leaves = list(loaded.leaves)
        for place, path in enumerate(loaded.model.specs):
            if path.endswith("router"):  # equal scores: the first two experts are taken
                leaves[place] = jax.device_put(0 * leaves[place], leaves[place].sharding)
        engine = Engine(loaded.model, tuple(leaves), section=SECTION)
        told.append(_run(engine, np.random.default_rng(0).integers(3, 70, 30).tolist()))
    assert told[0] == told[1]


def test_what_cannot_be_spread_names_the_flag_and_what_can():
    with pytest.raises(ValueError, match="expert=3.*divisor of model=8"):
        MeshSection(model=8, expert=3)
    with pytest.raises(
        ValueError,
        match=r"mesh.expert=4 does not divide the 10 experts: want one of \[1, 2\], which divide "
        "mesh.model=8 too",
    ):
        check_experts(10, MeshAxis(size=8, spread=4))
    with pytest.raises(ValueError, match="mesh.expert=2, but the model has no experts"):
        load(FOLDER / "llama", devices=grid(4, 2))


def test_experts_do_not_move_to_another_spread():
    shared = load(FOLDER / "mixtral", devices=grid(4, 2))
    with pytest.raises(ValueError, match="4 devices can't be moved to 4, experts from 2 to 4"):
        Placement(grid(4, 4), shared.model.heads).put_all(shared.model.specs, shared.leaves)
