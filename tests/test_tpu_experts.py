"""Mixtures of experts on TPUs that aren't there: experts are read as they are stored, once.

The product in every storage type on every chip, and whole decode blocks of two layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tpu_topology import compile_on, compiled_text, kernel_calls, temp_bytes

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
from lepton_jax.tensors import ParamSpec, QTensor
from lepton_jax.tensors.ragged_dots import ragged_dot

pytestmark = pytest.mark.slow

CHIPS = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1")
STATIC = {
    "int8": dict(),
    "w8a8": dict(act_bits=8),
    "float8": dict(values="float8_e4m3fn"),
    "int4": dict(values="int4", group=128),
    "int8-grouped": dict(group=32, asymmetric=True),
}


def leaf(kind, shape):
    spec = ParamSpec(shape, jnp.bfloat16, ("experts", "embed", "ffn"), 1)
    return (QTensor.planned(spec, **STATIC[kind]) if kind in STATIC else spec).abstract()


@pytest.mark.parametrize("chip", CHIPS)
def test_the_product_compiles_for_every_storage_type(chip):
    weights = {kind: leaf(kind, (16, 1024, 2048)) for kind in ("bfloat16", *STATIC)}
    weights["turned"] = leaf("int8", (16, 2048, 192))  # a width that fills no register

    def products(x, weights, sizes):
        return {k: ragged_dot(x[:, : w.shape[2]], w, sizes) for k, w in weights.items()}

    compiled = compile_on(
        Mesh(np.array(topology_devices(chip)[:1]).reshape(1, 1), ("data", "model")),
        products,
        jax.ShapeDtypeStruct((64, 2048), jnp.bfloat16),
        weights,
        jax.ShapeDtypeStruct((16,), jnp.int32),
    )
    assert len(kernel_calls(compiled_text(compiled), "ragged_dot")) == len(weights)
    assert temp_bytes(compiled) < 4 * 2**20  # an expert's int8 values alone are 2 MiB, all are 32


CASES = {
    "mixtral-8x7b": ("v5e:2x4", "v5e", 32),
    "qwen3-30b-a3b": ("v6e:2x2", "v6e", 64),  # an expert's ffn cut to 192 inputs
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_visited_experts_and_the_live_cache_and_little_more(name):
    topology, chip, rows = CASES[name]
    devices = topology_devices(topology)
    config = config_from_hf(hf_values(name) | dict(num_hidden_layers=2))
    model = abstract_model(config, jnp.bfloat16, jnp.bfloat16)
    leaves = compress_specs(preset_rules("int8"), model.specs)
    served = Served(model, leaves, attention_tpu, jnp.dtype(jnp.bfloat16), len(devices))
    sizes = full_sizes(served, EngineSection(), rows=rows, max_len=2048)
    decode = compile_decode(served, sizes, devices=devices, spec=SampleSpec(stop_ids=4))
    cost = decode_cost(served, TPUS[chip], rows=rows, context=2048)
    moved = decode.step_bytes + cost.cache_bytes
    print(f"{moved / (cost.weight_bytes + cost.cache_bytes):.3f} x the least")
    assert 0.99 < moved / (cost.weight_bytes + cost.cache_bytes) <= 1.10
    assert decode.memory.temporaries <= 64 * 2**20
    assert len(kernel_calls(decode.text, "ragged_dot")) == 4
