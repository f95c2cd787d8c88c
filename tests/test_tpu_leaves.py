"""Every leaf type in the engine's decode block, compiled for TPUs that aren't there.

A decode block of one layer as wide as Llama-3.1-8B's, in one leaf type, is compiled from specs
alone (`tpu_topology.py`). No decompressed weight fits a chip's vector memory, so each would show as
temporaries in HBM; and where the weights are quantized no line of the module outside of a fusion
may write a float array of a weight's size.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from published_configs import PUBLISHED
from tpu_topology import (
    argument_bytes,
    compile_on,
    compiled_text,
    copies_of,
    kernel_calls,
    temp_bytes,
    topology_mesh,
)

from lepton_jax.compression.presets import compress_specs
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.engine import packing, steps
from lepton_jax.engine.packing import DecodeShape
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.kernels import attention_tpu
from lepton_jax.models.build import abstract_model
from lepton_jax.models.registry import config_from_hf
from lepton_jax.planning.topology import topology_devices
from lepton_jax.tensors import CompressedTensor
from lepton_jax.tensors.matmul import matmul

pytestmark = pytest.mark.slow

ROWS, PAGE, WIDTH = 8, 64, 4
PRODUCTS = r"layers\.\d+\.(qkv|out|gate_up|down)"


def sparse(weights="int8", **fields):
    return Scheme(weights, prune="magnitude", storage="sparse", **fields)


QUANTIZED = {
    "int8": Scheme(),
    "w8a8": Scheme(activations="dynamic"),
    "w8a8-static": Scheme(activations="static"),
    "int8-grouped": Scheme(group=128),
    "int4": Scheme("int4", group=128),
    "int4-offset": Scheme("int4", group=128, asymmetric=True),
    "float8": Scheme("float8"),
    "float8-activations": Scheme("float8", activations="dynamic"),
}
SPARSE = {
    "bitmask": sparse(sparsity=0.5),
    "2:4": sparse(pattern="2:4"),
    "tiles-128": sparse(sparsity=0.5, pattern="256x128"),
    "tiles-64-bfloat16": sparse("keep", sparsity=0.5, pattern="128x64"),
}
SCHEMES = QUANTIZED | SPARSE
CHIPS = ["v5e:1x1", "v6e:1x1"]


# The smallest product is [4096, 4096]: 32 MiB in bfloat16, 16 MiB in int8.
MOST_TEMPORARIES = 15 * 2**20
TILES = 2**20  # more than all small arguments gain when they are padded to tiles


@functools.cache
def llama():
    """One layer of Llama-3.1-8B and a small vocabulary."""
    one_layer = dict(num_hidden_layers=1, vocab_size=8192)
    config = config_from_hf(PUBLISHED["llama-3.1-8b-instruct"] | one_layer)
    return abstract_model(config, jnp.bfloat16, jnp.bfloat16)


def arguments(kind):
    """Leaves, caches and state; tables stay int8 where the products are sparse."""
    scheme = SCHEMES[kind]
    tables = scheme if kind in QUANTIZED else Scheme()
    specs = compress_specs([Rule(PRODUCTS, scheme), Rule("embed|head", tables)], llama().specs)
    config = llama().config
    heads = (config.num_kv_heads, config.head_dim)
    cache = attention_tpu.cache_layer(ROWS * WIDTH + 1, PAGE, *heads, dtype=jnp.bfloat16).abstract()
    sample = SampleSpec(stop_ids=4)
    state = jax.eval_shape(lambda: steps.RowState.zeros(ROWS, config.vocab_size, sample))
    leaves = tuple(spec.abstract() for spec in specs.values())
    return leaves, ((cache,) * config.num_layers, ()), state  # no views here


def compiled(kind, chip):
    shape = DecodeShape(ROWS, 8, WIDTH, SampleSpec(stop_ids=4))
    step = functools.partial(steps.decode_block, model=llama(), backend=attention_tpu, shape=shape)
    layout = packing.decode_layout(shape)
    packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    mesh = topology_mesh(chip)
    return compile_on(mesh, step, *arguments(kind), packed, donate_argnums=[1, 2])


def dense_copies(text, kind):
    """Lines outside of fusions that make float arrays with as many elements as a compressed weight
    has, in HBM: S(1) in a layout is vector memory.
    """
    leaves = [leaf for leaf in arguments(kind)[0] if isinstance(leaf, CompressedTensor)]
    sizes = {math.prod(leaf.shape) for leaf in leaves}
    assert len(leaves) == 6
    found, fused = [], False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = "fused_computation" in line.split("(")[0]
        array = re.search(r"= \(?(?:bf16|f32|f16)\[([\d,]+)\](\S*)", line)
        in_hbm = array and not fused and "S(1)" not in array[2]
        if in_hbm and math.prod(map(int, array[1].split(","))) in sizes:
            found.append(line.strip())
    return found


def scales_held(text, kind):
    """Lines in front of a block's loop that copy qkv's or gate and up's scales by group; those of
    all layers would fill 100 MiB.
    """
    grouped = [leaf for leaf in arguments(kind)[0] if getattr(leaf, "group", 0)]
    leaves = [leaf for leaf in grouped if len(leaf.shape) > 2]
    entry = text[text.index("\nENTRY") :]
    copies = [line for leaf in leaves for line in copies_of(entry, leaf.scale.shape)]
    return [line for line in copies if " copy(" in line]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", SCHEMES)
def test_decode_compiles_without_decompressed_weights_in_hbm(kind, chip):
    program = compiled(kind, chip)
    promised = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arguments(kind)))
    assert promised <= argument_bytes(program) < promised + TILES
    assert temp_bytes(program) < MOST_TEMPORARIES
    text = compiled_text(program)
    if kind in QUANTIZED:
        assert dense_copies(text, kind) == []
        assert scales_held(text, kind) == []
    assert len(kernel_calls(text, "tiled_dot")) == (4 if kind.startswith("tiles") else 0)


@pytest.mark.parametrize("chip", ["v5p:1x1x1", "tpu7x:1x1x1"])
def test_products_compile_for_the_other_chips(chip):
    """One of each in a program: starting the compiler takes as long as they do."""
    spec = llama().specs["layers.0.down"]
    kinds = ("tiles-128", "tiles-64-bfloat16", "int8", "int4")
    one_device = np.array(topology_devices(chip)[:1]).reshape(1, 1)  # of a TPU7x chip's two
    program = compile_on(
        Mesh(one_device, ("data", "model")),
        lambda x, leaves: {kind: matmul(x, leaf) for kind, leaf in leaves.items()},
        jax.ShapeDtypeStruct((ROWS, spec.shape[-1]), jnp.bfloat16),
        {kind: SCHEMES[kind].plan(spec).abstract() for kind in kinds},
    )
    assert len(kernel_calls(compiled_text(program), "tiled_dot")) == 2
    assert temp_bytes(program) < MOST_TEMPORARIES


def test_a_decompressed_weight_would_be_seen():
    """The checks above, on a product that widens an int4 weight all at once."""

    def whole(x, leaf):
        return x @ leaf.flat().dense(jnp.bfloat16).T

    spec = llama().specs["layers.0.gate_up"]
    leaf = SCHEMES["int4"].plan(spec).abstract()
    x = jax.ShapeDtypeStruct((ROWS, 4096), jnp.bfloat16)
    program = compile_on(topology_mesh(CHIPS[0]), whole, x, leaf)
    assert temp_bytes(program) > MOST_TEMPORARIES
    assert dense_copies(compiled_text(program), "int4")
