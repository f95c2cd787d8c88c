"""Eight billion parameters on four chips that aren't there: what a step holds, moves and says.

The runner's own decode block of a Llama-3.1-8B in int8, from specs alone, for a mesh of four.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from published_configs import PUBLISHED
from tpu_topology import argument_bytes, compiled_text, copies_of, kernel_calls, temp_bytes

from lepton_jax.compression.presets import compress_specs, preset_rules
from lepton_jax.engine.packing import DecodeShape
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.rungs import Sizes
from lepton_jax.engine.runner import Runner
from lepton_jax.kernels import attention_tpu
from lepton_jax.models.build import abstract_model
from lepton_jax.models.registry import config_from_hf
from lepton_jax.planning.topology import compile_absent, topology_devices
from lepton_jax.planning.traffic import traffic
from lepton_jax.sharding import Placement

pytestmark = pytest.mark.slow

ROWS, PAGE, WIDTH, STEPS, CHIPS = 32, 64, 16, 8, 4
MOST_TEMPORARIES = 64 * 2**20


@functools.cache
def compiled():
    """(program, its text, bytes of weights and of the cache on a chip, the layer's cache)."""
    config = config_from_hf(PUBLISHED["llama-3.1-8b-instruct"])
    model = abstract_model(config, jnp.bfloat16, jnp.bfloat16)
    place = Placement(topology_devices("v5e:2x2"), model.heads)
    plans = compress_specs(preset_rules("int8"), model.specs)
    leaves = tuple(place.planned(model.specs[path], plan) for path, plan in plans.items())
    runner = Runner(
        model,
        leaves,
        sizes=Sizes(
            rows=ROWS,
            page_size=PAGE,
            num_pages=ROWS * WIDTH + 1,
            prefill_chunk=512,
            decode_block=STEPS,
            max_len=PAGE * WIDTH,
        ),
        backend=attention_tpu,
        kv_dtype=jnp.dtype(jnp.bfloat16),
        eos_ids=(),
        placement=place,
    )
    shape = DecodeShape(ROWS, STEPS, WIDTH, SampleSpec(stop_ids=4))
    program = compile_absent(runner.lower(shape))
    weights = sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(leaves)
    )
    return program, compiled_text(program), weights, runner


def test_a_chip_holds_its_part_and_hardly_anything_else():
    program, _, weights, runner = compiled()
    assert weights == pytest.approx(8.05e9 / CHIPS, rel=0.01)
    promised = weights + runner.kv_bytes
    assert promised < argument_bytes(program) < promised + 2**21
    print(f"{temp_bytes(program) / 2**20:.1f} MiB of temporaries")
    assert temp_bytes(program) < MOST_TEMPORARIES


def test_two_sums_a_layer_and_no_copy_of_a_cache():
    _, text, _, runner = compiled()
    for array in jax.tree.leaves(runner._abstract_caches()[0]):
        assert copies_of(text, array.shape) == []
    assert len(kernel_calls(text, "ragged_paged_attention")) == 32
    # Two a layer; one for the embedding, the best logit and its id.
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2 * 32 + 3
    assert not re.findall(r" (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


def test_a_step_reads_a_chips_weights_once():
    _, text, weights, runner = compiled()
    layer = jax.tree.leaves(runner._abstract_caches()[0])
    unseen = {array.size * array.dtype.itemsize: 0 for array in layer}
    once, twice = (traffic(text, steps=steps, partly=unseen) for steps in (1, 2))
    step = twice.total - once.total  # but for what attention reads of the cache
    config = runner.model.config
    needed = weights - config.vocab_size * config.hidden_size // CHIPS  # of the embedding, few rows
    print(f"{step / 2**20:.0f} MiB a step for {needed / 2**20:.0f} MiB of weights")
    assert 0.99 * needed < step <= 1.05 * needed
    assert twice.collectives["all-reduce"] - once.collectives["all-reduce"] == 2 * 32 + 3
