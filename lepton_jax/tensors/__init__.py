"""Leaf types of a parameter tree and the only operations that models apply to them.

A model never asks what a weight is: it calls `einsum`, `ragged_einsum` or `take`, and these
dispatch on the leaf: a plain array or a `CompressedTensor`. Read `leaves.py` for what a leaf type
must offer, `qtensor.py` for the quantized one, `sparse.py` for the sparse ones, `ops.py` for the
operations, and `matmul.py` for the one place where a matrix product is chosen.
"""

from lepton_jax.tensors.bitmask import BitmaskTensor
from lepton_jax.tensors.block_sparse import BlockSparseTensor
from lepton_jax.tensors.cut import Cut, CutTwice, Region
from lepton_jax.tensors.leaves import LEAF_TYPES, CompressedTensor, ParamSpec
from lepton_jax.tensors.nm import NMTensor
from lepton_jax.tensors.ops import einsum, einsum_parts, ragged_einsum, take
from lepton_jax.tensors.qtensor import QTensor

__all__ = [
    "LEAF_TYPES",
    "BitmaskTensor",
    "BlockSparseTensor",
    "CompressedTensor",
    "Cut",
    "CutTwice",
    "NMTensor",
    "ParamSpec",
    "QTensor",
    "Region",
    "einsum",
    "einsum_parts",
    "ragged_einsum",
    "take",
]
