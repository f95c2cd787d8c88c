"""One weight, compressed by any scheme that needs no calibration, and how far off a leaf is.

The parts are `prune.py` and `quantize.py`; schemes that need it go through `calibrate.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compression.prune import magnitude_mask, store
from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors.leaves import CompressedTensor, dense_of


def compress_weight(array: jax.Array, scheme: Scheme) -> CompressedTensor | jax.Array:
    """A weight `[*out, I]` pruned, quantized and stored on its device as the scheme says.

    Raises ValueError where the scheme is calibrated or its pattern doesn't fit the shape.
    """
    if scheme.calibrated:
        raise ValueError(
            f"scheme: prune={scheme.prune!r} rounding={scheme.rounding!r} "
            f"activations={scheme.activations!r} needs calibration: compress the model first "
            "(python -m lepton_jax.compress)"
        )
    if scheme.prune != "none":
        return store(array, magnitude_mask(array, scheme), scheme)
    return array if scheme.weights == "keep" else quantize(array, scheme)


@jax.jit
def relative_error(weight: jax.Array, leaf: Any) -> jax.Array:
    """|W - W'| / |W| in the Frobenius norm; 0 for weights of zeros. NaN where W has NaN."""
    wide = weight.astype(jnp.float32)
    off, size = jnp.sum((wide - dense_of(leaf, jnp.float32)) ** 2), jnp.sum(wide**2)
    return jnp.where(size == 0, off, jnp.sqrt(off / jnp.where(size == 0, 1, size)))
