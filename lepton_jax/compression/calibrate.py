"""Compression with the help of calibration tokens, layer by layer.

    leaves, errors = compress_layers(model, leaves, tokens, rules, options=Options())

Each layer sees what the compressed layers before it make of the tokens: its weights' inputs are
gathered (`statistics.py`), scales are folded where asked (`smooth.py`), the weights are compressed
(`gptq.py`, `sparsegpt.py`, `wanda.py`, ranges of static activations), and the compressed layer's
outputs go to the next. Besides the leaves, which become the compressed ones layer by layer, there
are one layer's weights and statistics and the hidden states of all tokens in memory. The layer's
programs are `layer_programs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import host_memory
from lepton_jax.compression.calibrated_leaf import (
    Options,
    compress_calibrated,
    kinds_for,
    relative_errors,
    unsuited,
)
from lepton_jax.compression.layer_programs import LayerPrograms, embedded, final_inputs, layer_of
from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.rules import Rule, assign, weights_of
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.smooth import needs_of, pairs_for, smoothed
from lepton_jax.models.build import Model
from lepton_jax.tensors import CompressedTensor

__all__ = ["Options", "compress_layers", "require_methods"]

Progress = Callable[[int, int, str], None]
Errors = dict[str, dict[str, Any]]


def compress_layers(
    model: Model,
    leaves: dict[str, Any],
    tokens: np.ndarray,
    rules: Sequence[Rule[Scheme]],
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Errors]:
    """The leaves by path of the compressed model, and what compression did to each weight.

    Args:
      model: of the leaves.
      leaves: by path of `model.specs`; what the rules name must be dense arrays. Each compressed
        leaf takes the place of the dense one, so that the memory of that is free where nobody else
        holds it.
      tokens: int32 `[windows, T]`; each window starts afresh.
      rules: first match wins, among the weights of products.
      options: of the methods.
      progress: called with (done, all, what) after each layer; the tables count as one more.

    Returns:
      The same leaves, with norms, biases and routers that smoothing changed, and by path of each
      compressed weight: "weight", the change's norm relative to the weight's; "product", that of
      its product with the calibration inputs, where they were gathered; "exponent" of smoothing,
      where done.

    Raises ValueError naming the rule where a method doesn't suit a weight, and naming the weight
    where it is no dense array or the result is not finite.
    """
    run = _Run(model, rules, options or Options())
    run.check(leaves, tokens)
    programs = LayerPrograms(model)
    total = model.config.num_layers + 1
    head = model.config.head_path
    if "embed" in run.schemes and not run.kinds("embed"):
        leaves["embed"] = run.compress("embed", leaves["embed"], None)
    x = embedded(model, leaves["embed"], jnp.asarray(tokens, jnp.int32))
    factors = leaves.get("rope_factors")
    for index in range(total - 1):
        prefix = f"layers.{index}."
        layer = run.layer(
            layer_of(leaves, index), x, programs=programs.of(index, factors), prefix=prefix
        )
        if run.looks_after(index):
            x = programs.of(index, factors).outputs(layer, x)
        leaves |= {prefix + name: leaf for name, leaf in layer.items()}
        host_memory.release()  # else what went stays with the process
        if progress is not None:
            progress(index + 1, total, f"layers.{index}")
    if head in run.schemes and head not in run.errors:
        kinds = run.kinds(head)
        seen = final_inputs(model, x, leaves["final_norm"], kinds) if kinds else None
        leaves[head] = run.compress(head, leaves[head], seen)
    if progress is not None:
        progress(total, total, head)
    return leaves, {path: run.errors[path] for path in model.specs if path in run.errors}


def require_methods(model: Model, rules: Sequence[Rule[Scheme]], options: Options) -> None:
    """Raises ValueError, naming the rule, where a method doesn't suit a weight of the model."""
    _Run(model, rules, options).check_methods()


class _Run:
    """The schemes of one compression, and the errors that it has made so far."""

    def __init__(self, model: Model, rules: Sequence[Rule[Scheme]], options: Options):
        self.model, self.options, self.errors = model, options, {}
        paths = weights_of(model.specs)
        self.rules = assign([Rule(rule.pattern, rule) for rule in rules], paths)
        self.schemes: dict[str, Scheme] = {
            path: rule.action
            for path, rule in self.rules.items()
            if rule.action.weights != "keep" or rule.action.prune != "none"
        }

    def kinds(self, path: str) -> tuple[str, ...]:
        """The statistics that the weight's scheme needs."""
        return kinds_for(self.schemes[path], self.options) if path in self.schemes else ()

    def looks_after(self, index: int) -> bool:
        """Whether activations after layer `index` are needed for anything."""
        for path in self.schemes:
            _, _, layer = path.partition("layers.")
            later = not layer or int(layer.partition(".")[0]) > index
            if later and (self.kinds(path) or (layer and self.options.smooth != "none")):
                return True
        return False

    def check(self, leaves: Mapping[str, Any], tokens: np.ndarray) -> None:
        """Raises ValueError for what can be known beforehand."""
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"calibration tokens have shape {tokens.shape}: want [windows, T]")
        self.check_methods()
        for path in self.schemes:
            if isinstance(leaves[path], CompressedTensor):
                raise ValueError(f"{path} is compressed already: calibrate the dense model")

    def check_methods(self) -> None:
        """Raises ValueError, naming the rule, where a method doesn't suit a weight."""
        for path in self.schemes:
            why = unsuited(self.model, path, self.schemes[path], self.options)
            if why:
                raise ValueError(f"compression rule {self.rules[path].pattern!r}: {why}")

    def layer(self, layer: dict[str, Any], x: jax.Array, *, programs, prefix: str) -> dict:
        """One layer's parameters by name, compressed, from the inputs `x [windows, T, D]`."""
        options, config = self.options, self.model.config
        schemes = {name: s for name in layer if (s := self.schemes.get(prefix + name))}
        exponents: dict[str, float] = {}
        if options.smooth != "none":
            needs = tuple(
                needs_of(options.smooth, pair) for pair in pairs_for(options.smooth, schemes)
            )
            layer, exponents = smoothed(
                layer,
                programs.statistics(layer, x, needs),
                schemes,
                config=config,
                method=options.smooth,
                alpha=options.alpha,
            )
        needs = tuple((name, kinds) for name in schemes if (kinds := self.kinds(prefix + name)))
        seen = programs.statistics(layer, x, needs) if needs else {}
        for name in schemes:
            path = prefix + name
            layer[name] = self.compress(path, layer[name], seen.get(name))
            if name in exponents:
                self.errors[path]["exponent"] = exponents[name]
        return layer

    def compress(self, path: str, array: jax.Array, statistics) -> Any:
        """One weight, whose errors are noted."""
        scheme = self.schemes[path]
        if statistics is None:
            leaf = compress_weight(array, scheme)
        else:
            leaf = compress_calibrated(array, scheme, statistics, self.options)
        errors = relative_errors(array, leaf, statistics)
        errors = {name: float(error) for name, error in errors.items()}
        if not all(np.isfinite(error) for error in errors.values()):
            raise ValueError(
                f"{path}: not finite after compression: its weights, or the activations before it, "
                f"hold NaN or infinity, or the Hessian needs more than damp={self.options.damp}"
            )
        self.errors[path] = errors
        return leaf
