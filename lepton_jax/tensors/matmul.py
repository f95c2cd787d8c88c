"""The matrix product of activations and one weight leaf: `[M, I] x [O, I] -> [M, O]`.

This is the one dispatch point for matrix products: a native kernel for a platform slots in here and
nowhere else. A compressed leaf brings its own product; a plain array's is here.
"""

import jax

from lepton_jax.tensors.dots import float_dot
from lepton_jax.tensors.leaves import CompressedTensor


def matmul(x: jax.Array, w) -> jax.Array:
    """`x [M, I]` times the transpose of `w [O, I]`, an array or compressed: `[M, O]` like x."""
    y = w.matmul(x) if isinstance(w, CompressedTensor) else float_dot(x, w)
    return y.astype(x.dtype)
