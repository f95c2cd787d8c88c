"""`Served`: a model as it will be served, without its weights; what every part of a plan takes."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from lepton_jax.models.build import Model
from lepton_jax.models.config import ModelConfig
from lepton_jax.tensors import CompressedTensor, ParamSpec

SHARDED_AXES = frozenset(("kv_heads", "heads", "ffn", "vocab"))


@dataclasses.dataclass(frozen=True)
class Served:
    """A model without values, and how it is stored and spread.

    Attributes:
      model: the abstract model.
      leaves: its abstract weights by path, as `compression.presets.compress_specs` gives them.
      backend: of attention; it lays the cache out.
      kv_dtype: of the cache.
      shards: devices that share the model; each holds 1/shards of what has a sharded axis.
    """

    model: Model
    leaves: Mapping[str, ParamSpec | CompressedTensor]
    backend: ModuleType
    kv_dtype: Any
    shards: int = 1

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def weight_bytes(self) -> int:
        """Of all weights on one device."""
        return sum(map(self.leaf_bytes, self.leaves.values()))

    def leaf_bytes(self, leaf: ParamSpec | CompressedTensor) -> int:
        """Of one weight on one device."""
        return sum(self._spec_bytes(spec) for spec in jax.tree.leaves(leaf))

    def _spec_bytes(self, spec: ParamSpec) -> int:
        cut = SHARDED_AXES & set(spec.axes)
        return -(-spec.nbytes // self.shards) if cut else spec.nbytes

    def cache_layer(self, pages: int, page_size: int) -> Any:
        """One layer's cache on one device, as a tree of ParamSpecs."""
        kv_heads, head_dim = -(-self.config.num_kv_heads // self.shards), self.config.head_dim
        return self.backend.cache_layer(pages, page_size, kv_heads, head_dim, dtype=self.kv_dtype)
