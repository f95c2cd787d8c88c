"""Attention compiles for every kind of TPU at every width of heads, decode and prefill.

Small shapes and one layer: whether Mosaic takes the kernel. Memory and copies are the business of
`test_kernels_tpu.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tpu_topology import compile_on, compiled_text, kernel_calls

from lepton_jax.kernels import attention_tpu as tpu
from lepton_jax.kernels.attention import PagedBatch, backend_for, decode_batch
from lepton_jax.planning.topology import topology_devices
from lepton_jax.tensors import vector_memory

pytestmark = pytest.mark.slow

CHIPS = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1")
HEADS = {64: (4, 2, 64), 96: (4, 2, 96), 128: (4, 2, 128), 256: (2, 2, 256)}
ROWS, WIDTH, PAGES, PAGE, TOKENS = 8, 4, 40, 64, 32


def decode(cache, q, lengths, table, backend=tpu):
    batch = decode_batch(lengths, lengths > 0, table)
    cache = backend.write(cache, q[:, :, 0], q[:, :, 1], batch)
    return cache, backend.attend(q, cache, batch, decode=True, scale=0.1)


def prefill(cache, q, batch):
    cache = tpu.write(cache, q[:, :, 0], q[:, :, 1], batch)
    return cache, tpu.attend(q, cache, batch, decode=False, scale=0.1, window=50, soft_cap=30.0)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize(("chip", "claimed"), zip(CHIPS, (96, 96, 48, 48), strict=True))
def test_a_kernel_claims_three_quarters_of_the_chips_vector_memory(chip, claimed):
    mesh = Mesh(np.array(topology_devices(chip)[:1]), ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert vector_memory.claim() == claimed * 2**20
    assert vector_memory.claim() == vector_memory.LEAST  # of this CPU


def both(cache, new, lengths, table, prompt, batch):
    """One program of both: starting the compiler takes as long as the kernels."""
    cache, token = decode(cache, new, lengths, table)
    cache, tokens = prefill(cache, prompt, batch)
    return cache, token, tokens


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("chip", ("v4:1x1x1", *CHIPS))
def test_decode_and_prefill_compile(chip, head_dim):
    heads = HEADS[head_dim]
    cache = tpu.cache_layer(PAGES, PAGE, heads[0], head_dim, dtype=jnp.bfloat16)
    batch = PagedBatch(
        positions=ints(TOKENS),
        rows=ints(TOKENS),
        page_table=ints(ROWS, WIDTH),
        kv_lens=ints(ROWS),
        cu_q_lens=ints(ROWS + 1),
        num_seqs=ints(1),
    )
    one_device = np.array(topology_devices(chip)[:1]).reshape(1, 1)  # of a TPU7x chip's two
    compiled = compile_on(
        Mesh(one_device, ("data", "model")),
        both,
        jax.tree.map(lambda spec: spec.abstract(), cache),
        jax.ShapeDtypeStruct((ROWS, *heads), jnp.bfloat16),
        ints(ROWS),
        ints(ROWS, WIDTH),
        jax.ShapeDtypeStruct((TOKENS, *heads), jnp.bfloat16),
        batch,
        donate_argnums=[0],
    )
    assert len(kernel_calls(compiled_text(compiled), "ragged_paged_attention")) == 2


@pytest.mark.parametrize("block", tpu.BLOCKS)
def test_any_block_of_cached_tokens_compiles(block):
    heads, width = HEADS[128], 4096 // PAGE
    cache = tpu.cache_layer(PAGES, PAGE, heads[0], 128, dtype=jnp.bfloat16)
    compiled = compile_on(
        Mesh(np.array(topology_devices("v5e:1x1")).reshape(1, 1), ("data", "model")),
        functools.partial(decode, backend=backend_for("tpu", block)),
        jax.tree.map(lambda spec: spec.abstract(), cache),
        jax.ShapeDtypeStruct((ROWS, *heads), jnp.bfloat16),
        ints(ROWS),
        ints(ROWS, width),
        donate_argnums=[0],
    )
    assert len(kernel_calls(compiled_text(compiled), "ragged_paged_attention")) == 1
