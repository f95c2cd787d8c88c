"""Automatic mixed precision: a budget in bytes or in KL, and the rules that make most of it.

    choice = choose(model, leaves, tokens, automatic, dense=dense, seed=0)
    choice.rules    # ordinary ones, as a person might have written them

Every weight is tried under every candidate on calibration tokens (`sensitivity.py`), then one is
chosen for each (`allocate.py`). What GPTQ shall round is tried rounded to nearest: the order of
weights is much the same, and what comes of it usually loses less than is predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.compression.allocate import allocate, rules_of
from lepton_jax.compression.calibrated_leaf import Options, unsuited
from lepton_jax.compression.rules import Rule, weights_of
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.sensitivity import (
    Progress,
    Sensitivity,
    measure_sensitivity,
    planned_bytes,
)
from lepton_jax.models.build import Model

_MEASURED = 16, 256  # windows, and tokens of each


@dataclasses.dataclass(frozen=True)
class Automatic:
    """What is asked for.

    Attributes:
      bytes: most of the compressed weights; up to 1: as a share of what the dense ones take in
        float32, whatever their dtype is. 0: the least within `kl`.
      kl: most that may be lost, as predicted, in nats a token; 0: the least within `bytes`.
      candidates: schemes to choose from.
      known: what they were found to lose before, on the same tokens; None: it is measured.
    """

    bytes: float = 0.0
    kl: float = 0.0
    candidates: tuple[Scheme, ...] = ()
    known: Sensitivity | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if not self:
            return
        if self.bytes and self.kl:
            raise ValueError(
                f"compression.auto_bytes={self.bytes} and auto_kl={self.kl} are both given: one "
                "is the budget, the other comes of it; drop one"
            )
        if not self.candidates:
            raise ValueError(
                "compression.candidates is empty: name schemes to choose from, such as "
                "'weights=int8' and 'weights=int4 group=32'"
            )
        if len(set(self.tried)) < len(set(self.candidates)):
            raise ValueError(
                "compression.candidates holds a scheme with rounding=gptq and with nearest, and "
                "both are tried as nearest, so that none is better: keep one of them"
            )
        for scheme, tried in zip(self.candidates, self.tried, strict=True):
            if tried.calibrated:
                raise ValueError(
                    f"compression.candidates: {scheme} can't be tried without calibration of its "
                    "own; take prune=magnitude, and activations=float or dynamic"
                )

    def __bool__(self) -> bool:
        return bool(self.bytes or self.kl)

    def __str__(self) -> str:
        return f"auto_bytes={self.bytes:g}" if self.bytes else f"auto_kl={self.kl:g}"

    @property
    def tried(self) -> tuple[Scheme, ...]:
        """What each candidate is measured as."""
        return tuple(map(_to_nearest, self.candidates))

    def rules(
        self, model: Model, chosen: Sequence[int], options: Options
    ) -> tuple[Rule[Scheme], ...]:
        """That give the model's weights the candidates of these indices, rounded to nearest where
        they can't be calibrated: an embedding that is only looked up, experts whose Hessians would
        fill the memory.
        """
        schemes = {}
        for path, index in zip(weights_of(model.specs), chosen, strict=True):
            scheme = self.candidates[index]
            if unsuited(model, path, scheme, options):
                scheme = dataclasses.replace(scheme, rounding="nearest")
            schemes[path] = scheme
        return rules_of(tuple(schemes), tuple(schemes.values()))

    def most_bytes(self, dense: Model) -> float:
        """Of all weights that are made of the dense model's."""
        if not self.bytes:
            return np.inf
        return self.bytes * _in_float32(dense) if self.bytes <= 1 else self.bytes

    def require_room(self, model: Model, dense: Model) -> None:
        """Raises ValueError, with the least, where the budget is less than the smallest choice for
        `model`, which is what structured pruning leaves of the dense one.
        """
        smallest = planned_bytes(model, self.candidates).min(1).sum() + _others(model)
        most = self.most_bytes(dense)
        if smallest > most:
            share = smallest / _in_float32(dense)
            raise ValueError(
                f"compression.auto_bytes={self.bytes:g} is a budget of {most:.0f} bytes: the "
                f"smallest that its candidates allow is {smallest}, {share:.4f} of the "
                "model in float32; raise it or add smaller candidates"
            )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen: the index of each path's scheme, and what that should cost.

    Attributes:
      automatic: what was asked for.
      sensitivity: what was measured.
      chosen: index of each weight's scheme.
      bytes, kl: of the whole model, as predicted.
      rules: that give each weight its scheme.
    """

    automatic: Automatic
    sensitivity: Sensitivity
    chosen: tuple[int, ...]
    bytes: int
    kl: float
    rules: tuple[Rule[Scheme], ...]


def choose(
    model: Model,
    leaves: Mapping[str, Any],
    tokens: np.ndarray,
    automatic: Automatic,
    *,
    dense: Model,
    options: Options | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Choice:
    """Measures and chooses.

    Args:
      model: of the dense arrays `leaves`, by path.
      tokens: int32 `[windows, T]` to calibrate on, of which 16 windows of 256 are looked at.
      automatic: the budget and the candidates.
      dense: the model before structured pruning, which a share of bytes refers to.
      options: of the methods that the rules will name.
      seed: of the draws (`sensitivity.py`).
      progress: called with (done, all, what).

    Raises ValueError where nothing fits the budget.
    """
    automatic.require_room(model, dense)
    found = automatic.known or measure_sensitivity(
        model, leaves, _few(tokens), automatic.tried, seed=seed, progress=progress
    )
    found = dataclasses.replace(found, schemes=automatic.candidates)
    others = _others(model)
    chosen = allocate(
        found.kl,
        found.bytes,
        most_bytes=automatic.most_bytes(dense) - others,
        most_loss=automatic.kl or np.inf,
    )
    lines = np.arange(len(chosen))
    size, loss = found.bytes[lines, chosen].sum(), found.kl[lines, chosen].sum()
    rules = automatic.rules(model, chosen, options or Options())
    return Choice(automatic, found, tuple(chosen), int(size) + others, float(loss), rules)


def _few(tokens: np.ndarray) -> np.ndarray:
    """Of windows `[windows, T]` those that sensitivities are measured on: for each token there are
    gradients of several draws.
    """
    windows, length = _MEASURED
    if tokens.size <= windows * length:
        return tokens
    return tokens[:: -(-len(tokens) // windows), :length]


def _to_nearest(scheme: Scheme) -> Scheme:
    """What needs no activations and takes the same bytes, where there is such."""
    return dataclasses.replace(scheme, rounding="nearest") if scheme.rounding == "gptq" else scheme


def _in_float32(model: Model) -> int:
    """Bytes of its weights, had they that dtype."""
    return 4 * sum(spec.size for spec in model.specs.values())


def _others(model: Model) -> int:
    """Bytes of what stays as it is: norms, biases, routers."""
    weights = set(weights_of(model.specs))
    return sum(spec.nbytes for path, spec in model.specs.items() if path not in weights)
