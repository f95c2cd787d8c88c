"""Products of experts on TPUs that aren't there, in every storage type on every chip: weights are
read as they are stored. Whole decode blocks: `test_tpu_steps.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tpu_topology import compile_on, compiled_text, kernel_calls, temp_bytes

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
