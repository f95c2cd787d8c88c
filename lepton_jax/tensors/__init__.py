"""Leaf types of a parameter tree and the only operations that models apply to them.

A model never asks what a weight is: it calls `einsum`, `ragged_einsum` or `take`, and these
dispatch on the leaf (a plain array or a `QTensor`). Read `leaves.py` for the types, `ops.py` for
the operations and `matmul.py` for the one place where a matrix product is chosen per leaf and
platform.
"""

from lepton_jax.tensors.leaves import ParamSpec, QTensor
from lepton_jax.tensors.ops import einsum, einsum_parts, ragged_einsum, take

__all__ = ["ParamSpec", "QTensor", "einsum", "einsum_parts", "ragged_einsum", "take"]
