"""Decode blocks of two layers on slices that aren't there: a step moves its weights and the live
cache, and little more.
"""

import jax.numpy as jnp
import pytest
from tpu_topology import kernel_calls

from lepton_jax.compression.presets import compress_specs, preset_rules
from lepton_jax.config import EngineSection
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.kernels import attention_tpu
from lepton_jax.models.build import abstract_model
from lepton_jax.models.published import hf_values
from lepton_jax.models.registry import config_from_hf
from lepton_jax.planning.chips import TPUS
from lepton_jax.planning.memory import full_sizes
from lepton_jax.planning.programs import compile_decode
from lepton_jax.planning.roofline import decode_cost
from lepton_jax.planning.served import Served
from lepton_jax.planning.topology import topology_devices

pytestmark = pytest.mark.slow

# Model, cache, slice, chip, rows, products of experts.
CASES = [
    ("llama-3.1-70b", "bfloat16", "v6e:2x4", "v6e", 64, 0),  # a layer's cache would fit VMEM
    ("llama-3.1-70b", "bfloat16", "v6e:2x4", "v6e", 8, 0),  # or what kernels leave of it
    ("llama-3.1-70b", "int8", "v6e:2x4", "v6e", 64, 0),
    ("llama-3.1-8b", "int8", "v5e:1x1", "v5e", 16, 0),
    ("mixtral-8x7b", "bfloat16", "v5e:2x4", "v5e", 32, 4),
    ("qwen3-30b-a3b", "bfloat16", "v6e:2x2", "v6e", 64, 4),  # an expert's ffn cut to 192 inputs
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_moves_what_it_reads_and_little_more(case):
    name, kv_dtype, topology, chip, rows, expert_products = case
    devices = topology_devices(topology)
    config = config_from_hf(hf_values(name) | dict(num_hidden_layers=2))
    model = abstract_model(config, jnp.bfloat16, jnp.bfloat16)
    leaves = compress_specs(preset_rules("int8"), model.specs)
    served = Served(model, leaves, attention_tpu, jnp.dtype(kv_dtype), len(devices))
    sizes = full_sizes(served, EngineSection(), rows=rows, max_len=2048)
    decode = compile_decode(served, sizes, devices=devices, spec=SampleSpec(stop_ids=4))
    cost = decode_cost(served, TPUS[chip], rows=rows, context=2048)  # of experts, those visited
    moved = decode.step_bytes + cost.cache_bytes
    print(f"{moved / (cost.weight_bytes + cost.cache_bytes):.3f} x the least")
    assert 0.99 < moved / (cost.weight_bytes + cost.cache_bytes) <= 1.10
    assert decode.memory.temporaries <= 64 * 2**20
    assert len(kernel_calls(decode.text, "ragged_dot")) == expert_products
