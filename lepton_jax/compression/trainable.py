"""Which numbers of a compressed model recovery trains, and the leaves that come of them.

    parts = Trainable(model, leaves, train="all", rank=16)
    parts.zeros(leaves, seed)        # what is trained, at the start; it changes nothing
    parts.applied(leaves, trained)   # leaves of the same types and shapes

A trained array is `start + unit * p`: `unit` is the root mean square of the start, so that one
learning rate suits scales and weights alike. Leaves keep their types, integers and zeros: of an
int8 or int4 weight only scales and offsets train, of a sparse one the values that it stores, and of
an array that was pruned in place those that aren't 0. Who trains: `training.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.models.build import Model
from lepton_jax.tensors import CompressedTensor, ParamSpec
from lepton_jax.tensors.sparse import SparseTensor

_SCALES = ("scale", "offset")
_LAYER_WEIGHT = re.compile(r"layers\.\d+\.(?!router).*")
Trained = dict[str, dict[str, jax.Array]]


class Trainable:
    """What trains of the leaves of a model.

    "norms": norm scales, biases, and the scales and offsets of quantized weights. "lora": these,
    and for each weight of a layer that holds floats a product of rank `rank`, which is added to its
    stored values, so that nothing remains of it in the result. "all": these and all float values of
    the layers' weights. Tables of embeddings and the head stay: a text of this size hardly touches
    most of their rows.
    """

    def __init__(self, model: Model, leaves: Mapping[str, Any], *, train: str, rank: int):
        """Raises ValueError where nothing of that kind is in the model.

        Args:
          model: of the leaves.
          leaves: by path.
          train: "norms", "lora" or "all".
          rank: of "lora".
        """
        self._fields: dict[str, tuple[str, ...]] = {}
        self._adapted: dict[str, tuple[int, ...]] = {}
        self._rank = rank
        self._held = {
            path for path, s in model.specs.items() if s.inputs and _has_zeros(leaves[path])
        }
        values = trained_values(model.specs, leaves, train=train)
        if train == "lora":
            self._adapted = {path: model.specs[path].shape for path in values}
        for path, spec in model.specs.items():
            fields = _small_fields(leaves[path], inputs=spec.inputs, path=path)
            if train == "all" and path in values:
                fields += (_value_field(leaves[path]),)
            if fields:
                self._fields[path] = fields

    def zeros(self, leaves: Mapping[str, Any], seed: int) -> Trained:
        """What is trained, float32, at a place where it changes nothing: by path and name."""
        start: Trained = {
            path: {name: jnp.zeros(_field(leaves[path], name).shape, jnp.float32) for name in names}
            for path, names in self._fields.items()
        }
        keys = jax.random.split(jax.random.key(seed), max(1, len(self._adapted)))
        for key, (path, shape) in zip(keys, self._adapted.items(), strict=False):
            *outs, inputs = shape
            narrow = jax.random.normal(key, (self._rank, inputs), jnp.float32) / self._rank
            wide = jnp.zeros((*outs, self._rank), jnp.float32)
            start[path] = start.get(path, {}) | {"lora_a": narrow, "lora_b": wide}
        return start

    def applied(self, leaves: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
        """The leaves with what was trained, in their own dtypes; differentiable."""
        return dict(leaves) | {
            path: self._one(path, leaves[path], parts) for path, parts in trained.items()
        }

    def _one(self, path: str, leaf: Any, parts: Mapping[str, jax.Array]) -> Any:
        changes = {n: _moved(_field(leaf, n), parts[n]) for n in self._fields.get(path, ())}
        if path in self._adapted:
            name = _value_field(leaf)
            added = jnp.matmul(parts["lora_b"], parts["lora_a"], precision="highest")
            added = _gathered(leaf, added) if isinstance(leaf, SparseTensor) else added
            changes[name] = _moved(_field(leaf, name), added)
        if path in self._held:
            changes[""] = jnp.where(leaf == 0, leaf, changes[""]) if "" in changes else leaf
        if not isinstance(leaf, CompressedTensor):
            return changes[""]
        return dataclasses.replace(leaf, **changes)


def trained_values(
    specs: Mapping[str, ParamSpec], leaves: Mapping[str, Any], *, train: str
) -> tuple[str, ...]:
    """Weights of layers that hold floats, which "all" trains and "lora" adds to; leaves by path,
    which may be planned ones.

    Raises ValueError where "lora" finds none.
    """
    found = tuple(
        path
        for path, spec in specs.items()
        if spec.inputs and _LAYER_WEIGHT.fullmatch(path) and _value_field(leaves[path]) is not None
    )
    if train == "lora" and not found:
        raise ValueError(
            "recovery.train='lora': no weight of a layer holds floats to add to (int8 and int4 "
            "values are fixed): take recovery.train=norms, which trains their scales"
        )
    return found


def _small_fields(leaf: Any, *, inputs: int, path: str) -> tuple[str, ...]:
    """Norm scale, bias, or the scales of a compressed weight; "" is an array itself."""
    if isinstance(leaf, CompressedTensor):
        return tuple(name for name in _SCALES if name in leaf.arrays())
    return () if inputs or path == "rope_factors" else ("",)


def _value_field(leaf: Any) -> str | None:
    """The field of a weight that holds trainable floats."""
    if not isinstance(leaf, CompressedTensor):
        return ""
    floats = isinstance(leaf, SparseTensor) and jnp.issubdtype(leaf.values.dtype, jnp.floating)
    return "values" if floats else None


def _field(leaf: Any, name: str) -> jax.Array:
    return getattr(leaf, name) if name else leaf


def _moved(start: jax.Array, change: jax.Array) -> jax.Array:
    wide = start.astype(jnp.float32)
    unit = jnp.sqrt(jnp.mean(wide**2))
    return (wide + jnp.where(unit > 0, unit, 1e-2) * change).astype(start.dtype)


def _gathered(leaf: SparseTensor, dense: jax.Array) -> jax.Array:
    """Of a dense `[*out, I]` what belongs to each stored value: spreading, transposed."""
    bare = dataclasses.replace(leaf, scale=None)
    values = jnp.zeros(leaf.values.shape, jnp.float32)
    _, transpose = jax.vjp(lambda v: dataclasses.replace(bare, values=v).spread(), values)
    return transpose(dense)[0]


def _has_zeros(leaf: Any) -> bool:
    """Whether an array has weights that are pruned, and stay so."""
    return not isinstance(leaf, CompressedTensor) and bool(jnp.any(leaf == 0))
