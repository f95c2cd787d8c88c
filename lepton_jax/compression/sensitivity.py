"""How much a model's predictions change when one weight is compressed: KL for each weight and
scheme, without running the whole model for each.

    found = measure_sensitivity(model, leaves, tokens, schemes)
    found.kl[found.paths.index("layers.3.down"), 0]     # nats a token

For a small change of the weights KL(dense || changed) is half its square in the metric of the
Fisher information (Kullback, "Information Theory and Statistics", 1959). Drawn from the model's own
predictions, next tokens y give that metric: KL = E[(sum_t d log p(y_t))^2] / 2 for a window. So the
gradients of some draws are pulled down through the layers once, and each weight and scheme costs a
run of its own layer, whose change is multiplied with them. The estimate of KL has a relative
standard error of sqrt(2 / (windows * draws)). Not seen: routers of experts in later layers that
choose otherwise. What is made of it: `allocate.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.compression.layer_programs import LayerPrograms, embedded, layer_of
from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.quality import logits_of
from lepton_jax.compression.rules import weights_of
from lepton_jax.compression.scheme import Scheme, planned_leaf
from lepton_jax.models.build import Model
from lepton_jax.models.decoder import rms_norm
from lepton_jax.tensors.leaves import dense_of

DRAWS = 8  # next tokens drawn at each place
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What each weight would lose and weigh.

    Attributes:
      paths: of the weights of products.
      schemes: that were tried.
      kl: `[weights, schemes]`, KL(dense || model with only this weight compressed), nats a token.
      bytes: int64 `[weights, schemes]`.
    """

    paths: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    kl: np.ndarray
    bytes: np.ndarray


def measure_sensitivity(
    model: Model,
    leaves: Mapping[str, Any],
    tokens: np.ndarray,
    schemes: Sequence[Scheme],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Of every weight of a product.

    Args:
      model: dense; `leaves` its arrays by path.
      tokens: int32 `[windows, T]`; each window starts afresh.
      schemes: none of them calibrated.
      draws: next tokens drawn at each place.
      seed: of the draws.
      progress: called with (done, all, what) after each layer; the tables count as one more.

    Raises ValueError naming the weight where a scheme doesn't fit it.
    """
    sizes, ids = planned_bytes(model, schemes), jnp.asarray(tokens, jnp.int32)
    run = _Run(model, leaves, ids, schemes, draws=draws, seed=seed)
    total = model.config.num_layers + 1
    for done, index in enumerate(reversed(range(total - 1)), 1):
        run.layer(index)
        if progress is not None:
            progress(done, total, f"layers.{index}")
    run.table()
    if progress is not None:
        progress(total, total, "embed")
    paths = weights_of(model.specs)
    # `[schemes, windows, draws]` for each path: half the mean square, by token
    squares = [np.mean(np.square(run.changes[path]), axis=(1, 2)) for path in paths]
    kl = np.stack(squares).astype(np.float64) / (2 * tokens.shape[1])
    return Sensitivity(tuple(paths), tuple(schemes), kl, sizes)


def planned_bytes(model: Model, schemes: Sequence[Scheme]) -> np.ndarray:
    """int64 `[weights, schemes]`. Raises ValueError naming the weight that a scheme doesn't fit."""
    paths = weights_of(model.specs)
    plans = [[planned_leaf(path, model.specs[path], s) for s in schemes] for path in paths]
    sizes = [[sum(spec.nbytes for spec in jax.tree.leaves(plan)) for plan in row] for row in plans]
    return np.array(sizes, np.int64)


class _Run:
    """From the last layer down: `gradients [windows, draws, T, D]` are those of the draws' log p by
    what the layer at hand gives; `changes [schemes, windows, draws]` of each path are its effects
    on the sum of a window's log p.
    """

    def __init__(self, model, leaves, tokens, schemes, *, draws: int, seed: int):
        self.model, self.leaves, self.tokens, self.schemes = model, leaves, tokens, schemes
        self.changes: dict[str, np.ndarray] = {}
        self._programs = LayerPrograms(model)
        self._weights = set(weights_of(model.specs))
        x = embedded(model, leaves["embed"], tokens)
        self._inputs = []
        for index in range(model.config.num_layers):
            self._inputs.append(x)
            x = self._of(index).outputs(layer_of(leaves, index), x)
        self._outputs = x
        head = model.config.head_path
        top = leaves["final_norm"], leaves[head]
        keys = jax.random.split(jax.random.key(seed), len(tokens))
        drawn, self.gradients = _draw(model, x, top, keys, draws=draws)
        others = [compress_weight(leaves[head], scheme) for scheme in schemes]
        self.changes[head] = np.stack(
            [_head_change(model, x, top, other, drawn=drawn) for other in others]
        )

    def _of(self, index: int):
        return self._programs.of(index, self.leaves.get("rope_factors"))

    def layer(self, index: int) -> None:
        """The weights of a layer, the last one first; leaves the gradients by its inputs."""
        x, layer, programs = self._inputs.pop(), layer_of(self.leaves, index), self._of(index)
        for name in layer:
            path = f"layers.{index}.{name}"
            if path not in self._weights:
                continue
            rows = []
            for scheme in self.schemes:
                changed = layer | {name: _compressed(layer[name], scheme)}
                rows.append(_change(self.gradients, programs.outputs(changed, x), self._outputs))
            self.changes[path] = np.stack(rows)
        self.gradients = programs.pulled(layer, x, self.gradients)
        self._outputs = x

    def table(self) -> None:
        """The embeddings, once all layers are done."""
        if "embed" not in self._weights:
            return
        rows = []
        for scheme in self.schemes:
            table = compress_weight(self.leaves["embed"], scheme)
            x = embedded(self.model, table, self.tokens)
            rows.append(_change(self.gradients, x, self._outputs))
        self.changes["embed"] = self.changes.get("embed", 0.0) + np.stack(rows)


def _compressed(array: jax.Array, scheme: Scheme) -> Any:
    """As it is stored, or where activations stay as they are its values, so that all such schemes
    run in one program.
    """
    leaf = compress_weight(array, scheme)
    return leaf if leaf is array or scheme.activations != "float" else _values(leaf)


@jax.jit
def _values(leaf: Any) -> jax.Array:
    return dense_of(leaf, jnp.float32)


@jax.jit
def _change(gradients: jax.Array, changed: jax.Array, outputs: jax.Array) -> jax.Array:
    """`[windows, draws]` of gradients `[windows, draws, T, D]` and outputs `[windows, T, D]`."""
    off = changed.astype(jnp.float32) - outputs.astype(jnp.float32)
    return jnp.einsum("wstd,wtd->ws", gradients.astype(jnp.float32), off, precision="highest")


@functools.partial(jax.jit, static_argnums=0, static_argnames="draws")
def _draw(model: Model, x: jax.Array, top: tuple, keys: jax.Array, *, draws: int):
    """Next tokens i32 `[windows, draws, T]`, and the gradients of the sums of their log p by the
    last layer's outputs `x`, `[windows, draws, T, D]`; `top` is the final norm and the head.
    """
    norm, head = top

    def window(operands):
        x, key = operands

        def log_p(x):
            return jax.nn.log_softmax(logits_of(model, head, rms_norm(x, norm, eps)))

        values, pull = jax.vjp(log_p, x)
        tokens = jax.random.categorical(key, values, shape=(draws, x.shape[0]))
        gradients = jax.lax.map(
            lambda ids: pull(jax.nn.one_hot(ids, values.shape[1], dtype=values.dtype))[0], tokens
        )
        return tokens, gradients

    eps = model.config.norm_eps
    return jax.lax.map(window, (x, keys))


@functools.partial(jax.jit, static_argnums=0)
def _head_change(model: Model, x: jax.Array, top: tuple, other, *, drawn: jax.Array) -> jax.Array:
    """`[windows, draws]`: what another head changes in the sums of log p, to first order."""
    norm, head = top

    def window(operands):
        x, ids = operands  # [T, D], [draws, T]
        hidden = rms_norm(x, norm, model.config.norm_eps)
        dense, changed = (logits_of(model, leaf, hidden) for leaf in (head, other))
        off = changed - dense
        mean = jnp.sum(jax.nn.softmax(dense) * off, axis=-1)  # [T]
        chosen = jnp.take_along_axis(off, ids.T, axis=1)  # [T, draws]
        return jnp.sum(chosen - mean[:, None], axis=0)

    return jax.lax.map(window, (x, drawn))
