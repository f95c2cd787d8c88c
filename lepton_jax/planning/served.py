"""`Served`: a model as it will be served, without its weights; what every part of a plan takes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from lepton_jax.kernels.attention import Backend
from lepton_jax.models.build import Model
from lepton_jax.models.config import ModelConfig
from lepton_jax.sharding import Axis
from lepton_jax.sharding.partition import cut_of, piece_plan
from lepton_jax.sharding.placement import axis_of
from lepton_jax.tensors import CompressedTensor, ParamSpec


@dataclasses.dataclass(frozen=True)
class Served:
    """A model without values, and how it is stored and spread.

    Attributes:
      model: the abstract model.
      leaves: its abstract weights by path, as `compression.presets.compress_specs` gives them.
      backend: of attention; it lays the cache out.
      kv_dtype: of the cache.
      shards: devices that share the model, each with its part (`lepton_jax/sharding`).
      spread: of them, over how many experts are spread.
      page_size: of the cache, on which padding depends.
    """

    model: Model
    leaves: Mapping[str, ParamSpec | CompressedTensor]
    backend: Backend
    kv_dtype: Any
    shards: int = 1
    spread: int = 1
    page_size: int = 64

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def axis(self) -> Axis:
        return axis_of(self.shards, self.model.heads, spread=self.spread)

    def piece(self, path: str) -> ParamSpec | CompressedTensor:
        """One device's part of a weight, padding included.

        Raises ValueError where its storage type can't be cut so.
        """
        spec = self.model.specs[path]
        return piece_plan(self.leaves[path], spec, cut_of(spec, self.axis, self.model.heads))

    def piece_bytes(self, path: str) -> int:
        """Of one device's part of a weight."""
        return sum(spec.nbytes for spec in jax.tree.leaves(self.piece(path)))

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Of all weights on one device."""
        return sum(map(self.piece_bytes, self.leaves))

    def cache_layer(self, pages: int, page_size: int) -> Any:
        """One layer's cache on one device, as a tree of ParamSpecs."""
        kv_heads, head_dim = self.axis.kv_share(self.config.num_kv_heads), self.config.head_dim
        return self.backend.cache_layer(pages, page_size, kv_heads, head_dim, dtype=self.kv_dtype)
