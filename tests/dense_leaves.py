"""What leaves stand for, in one program for all leaves of a type and a shape."""

import jax
import jax.numpy as jnp

from lepton_jax.tensors import CompressedTensor


@jax.jit
def dense_of(leaf):
    """A compressed weight as a float32 array; arrays stay as they are."""
    return leaf.dense(jnp.float32) if isinstance(leaf, CompressedTensor) else leaf
