"""Devices that share a model: families on their meshes, dense or compressed, give the tokens of one
device. Several such replicas, of a compressed Llama, are in test_distributed_pool.py.
"""

import jax
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection, MeshSection, SamplingParams
from lepton_jax.distributed.local import device_groups
from lepton_jax.engine.loop import Engine

SECTION = EngineSection(
    rows=4, page_size=8, num_pages=16, prefill_chunk=32, decode_block=8, max_len=24
)
MESHES = {
    "mixtral": (MeshSection(data=2, model=4, expert=2), "int8"),
    "qwen3": (MeshSection(model=4), ""),
}


def tokens(engine):
    """Of eight rows, by name."""
    draw = np.random.default_rng(3)
    told = {f"{n}/0": [] for n in range(8)}
    for name in told:
        ids = draw.integers(3, 70, 8).tolist()
        engine.add_request(name, ids, SamplingParams(max_tokens=9, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            told[output.request_id] += output.token_ids
    return told


@pytest.mark.parametrize("case", MESHES)
def test_tokens_of_one_device(case):
    """On the last devices of the mesh, which aren't the first where there are several replicas."""
    mesh, preset = MESHES[case]
    model, leaves = tiny(case, layers=1)
    if preset:
        compress = compressor(preset_rules(preset), model.specs)
        pairs = zip(model.specs.items(), leaves, strict=True)
        leaves = tuple(compress(path, spec, leaf) for (path, spec), leaf in pairs)
    *_, devices = device_groups(mesh)
    shared = Engine(model, leaves, section=SECTION, devices=devices)
    alone = Engine(model, leaves, section=SECTION, devices=jax.devices()[:1])
    assert tokens(shared) == tokens(alone)
