"""Replicas that each share a model: families on meshes of data x model, dense or compressed,
give the tokens of one device.
"""

import jax
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection, JobSection, MeshSection, RunConfig, SamplingParams
from lepton_jax.distributed.local import device_groups, local_pool
from lepton_jax.engine.loop import Engine

SECTION = EngineSection(
    rows=4, page_size=8, num_pages=16, prefill_chunk=32, decode_block=8, max_len=24
)
MESHES = {
    "llama": ((2, 2, 1), "int8"),
    "mixtral": ((2, 4, 2), "int8"),
    "qwen3": ((1, 4, 1), ""),
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
    (data, model_parts, expert), preset = MESHES[case]
    model, leaves = tiny(case, layers=1)
    if preset:
        compress = compressor(preset_rules(preset), model.specs)
        pairs = zip(model.specs.items(), leaves, strict=True)
        leaves = tuple(compress(path, spec, leaf) for (path, spec), leaf in pairs)
    mesh = MeshSection(data=data, model=model_parts, expert=expert)
    engines = [
        Engine(model, leaves, section=SECTION, devices=devices) for devices in device_groups(mesh)
    ]
    config = RunConfig(engine=SECTION, mesh=mesh, job=JobSection(exact=True))
    pool = local_pool(engines, config)
    try:
        shared = tokens(pool)
    finally:
        pool.close()
    assert shared == tokens(Engine(model, leaves, section=SECTION, devices=jax.devices()[:1]))
