"""`Scheme`: what becomes of one weight, as a rule or a config names it, and what it needs for that.

A scheme is plain data; the arithmetic is in the module that its fields name (`quantize.py` and its
neighbours). Read next: `rules.py` (which weight gets which), `presets.py`.
"""

import dataclasses
import math
import re

import jax.numpy as jnp

from lepton_jax.tensors import BitmaskTensor, BlockSparseTensor, NMTensor, ParamSpec, QTensor
from lepton_jax.tensors.block_sparse import check_tiles
from lepton_jax.tensors.leaves import CompressedTensor

WEIGHTS = ("int8", "int4", "float8", "keep")
PRUNING = ("none", "magnitude", "wanda", "sparsegpt")
STORAGE = ("dense", "sparse")
ACTIVATIONS = ("float", "dynamic", "static")
ROUNDING = ("nearest", "mse", "gptq")
_STORED = {"int8": "int8", "int4": "int4", "float8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight `[*out, I]` is pruned and quantized.

    Attributes:
      weights: storage of the values: int8, int4, float8 (e4m3), or "keep" as they are.
      group: most inputs that share a scale; the largest even divisor of I that is no larger is
        taken. 0: one scale per output.
      asymmetric: an offset besides the scale of each group.
      activations: "float" leaves them as they are; "dynamic" quantizes them per token while the
        program runs; "static" with one calibrated scale.
      rounding: "nearest" with the largest magnitude on the last level, "mse" with the range that
        gives the least squared error, "gptq" with the error of each input compensated by the next
        (calibrated).
      prune: which weights become 0: "magnitude" the smallest, "wanda" those with the smallest
        product of magnitude and input norm, "sparsegpt" those whose loss the others can best make
        up for (the last two are calibrated).
      sparsity: share of the weights that becomes 0; leave it out where the pattern is "N:M".
      pattern: "unstructured", "N:M" (N kept of every M inputs, as "2:4"), or "RxC" (whole tiles of
        R outputs by C inputs, as "192x32", equally many in each row of tiles).
      storage: "dense" keeps the zeros; "sparse" stores what is kept and where it belongs.
    """

    weights: str = "int8"
    group: int = 0
    asymmetric: bool = False
    activations: str = "float"
    rounding: str = "nearest"
    prune: str = "none"
    sparsity: float = 0.0
    pattern: str = "unstructured"
    storage: str = "dense"

    def __post_init__(self):
        for name, allowed in (
            ("weights", WEIGHTS),
            ("activations", ACTIVATIONS),
            ("rounding", ROUNDING),
            ("prune", PRUNING),
            ("storage", STORAGE),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"scheme: {name}={value!r}: allowed are {', '.join(allowed)}")
        if self.weights == "int4" and self.group < 2:
            raise ValueError(f"scheme: int4 needs a group of 2 or more inputs, not {self.group}")
        if self.asymmetric and not self.group:
            raise ValueError("scheme: asymmetric needs a group")
        if self.activations != "float" and self.group:
            raise ValueError(f"scheme: activations={self.activations!r} needs group=0")
        if self.activations == "static" and self.weights != "int8":
            raise ValueError("scheme: static activations need int8 weights")
        plain = (self.group, self.activations, self.rounding) == (0, "float", "nearest")
        if self.weights == "keep" and not plain:
            raise ValueError(
                "scheme: weights='keep' quantizes nothing: leave out group, activations, rounding"
            )
        self._check_pruning()

    def _check_pruning(self):
        if self.prune == "none":
            if (self.sparsity, self.pattern, self.storage) != (0.0, "unstructured", "dense"):
                raise ValueError(
                    f"scheme: sparsity={self.sparsity} pattern={self.pattern!r} "
                    f"storage={self.storage!r} without a method: set prune to one of "
                    f"{', '.join(PRUNING[1:])}"
                )
            return
        if self.n_of_m:
            n, m = self.n_of_m
            if not 0 < n < m <= 16:
                raise ValueError(f"scheme: pattern={self.pattern!r}: want 0 < N < M <= 16")
            if self.sparsity not in (0.0, 1 - n / m):
                raise ValueError(
                    f"scheme: sparsity={self.sparsity} with pattern={self.pattern!r}, which is "
                    f"{1 - n / m}: leave sparsity out"
                )
        elif self.pattern != "unstructured" and not (self.tile and min(self.tile) > 0):
            raise ValueError(
                f"scheme: pattern={self.pattern!r}: allowed are unstructured, N:M such as 2:4, "
                "and RxC such as 192x32"
            )
        if not self.n_of_m and not 0 < self.sparsity < 1:
            raise ValueError(
                f"scheme: sparsity={self.sparsity}: want the share that becomes 0, between 0 and 1"
            )
        if self.prune == "sparsegpt" and self.tile:
            raise ValueError(
                f"scheme: prune='sparsegpt' pattern={self.pattern!r}: want unstructured or N:M "
                "(tiles are pruned by magnitude or wanda)"
            )
        if self.asymmetric:
            raise ValueError("scheme: an asymmetric grid may hold no 0: prune on a symmetric one")
        if self.storage == "sparse":
            stored = self.weights in ("int8", "keep") and not self.group
            if not stored or self.activations != "float":
                raise ValueError(
                    f"scheme: storage='sparse' with weights={self.weights!r} group={self.group} "
                    f"activations={self.activations!r}: want int8 or keep, group 0, float"
                )

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see activations first."""
        pruned = self.prune in ("wanda", "sparsegpt")
        return pruned or self.rounding == "gptq" or self.activations == "static"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of a pattern "N:M"."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def tile(self) -> tuple[int, int] | None:
        """(R outputs, C inputs) of a pattern "RxC"."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    def kept_of(self, count: int) -> int:
        """How many of `count` weights or tiles that are compared with each other are kept.

        Raises ValueError where none would be.
        """
        kept = count - round(self.sparsity * count)
        if not kept:
            raise ValueError(f"scheme: sparsity={self.sparsity} leaves none of {count}: lower it")
        return kept

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a weight of `inputs` inputs; 0: all."""
        fitting = (size for size in range(self.group, 1, -1) if not (inputs % size or size % 2))
        group = next(fitting, 0)
        if self.group and not group:
            raise ValueError(f"scheme: no even group up to {self.group} divides {inputs} inputs")
        return group

    def divides(self, inputs: int, first: int, end: int) -> bool:
        """Whether some outputs of a weight, and of its `inputs` those from `first` to `end`, become
        by themselves what they become as parts of it.
        """
        if self.prune != "none":
            return False
        if self.weights == "keep" or (first, end) == (0, inputs):
            return True
        group = self.group_of(inputs)
        if not group or first % group or end % group:
            return False
        return self.group_of(end - first) == group

    def plan(self, spec: ParamSpec) -> CompressedTensor | ParamSpec:
        """The leaf of ParamSpecs that a weight of this spec becomes; the spec where it stays an
        array.

        Raises ValueError where the pattern doesn't fit. How many weights SparseGPT keeps of an
        unstructured pattern may differ from the plan by rounding in each block of inputs.
        """
        if self.storage == "sparse":
            return self._plan_sparse(spec)
        self.require_pattern(spec.shape)
        if self.weights == "keep":
            return spec
        return QTensor.planned(
            spec,
            values=_STORED[self.weights],
            group=self.group_of(spec.shape[-1]),
            asymmetric=self.asymmetric,
            static_activations=self.activations == "static",
            act_bits=16 if self.activations == "float" else 8,
        )

    def _plan_sparse(self, spec: ParamSpec) -> CompressedTensor:
        values = "int8" if self.weights == "int8" else jnp.dtype(spec.dtype).name
        inputs = spec.shape[-1]
        if self.n_of_m:
            n, m = self.n_of_m
            return NMTensor.planned(spec, n=n, m=m, values=values)
        if self.tile:
            height, width = self.tile
            kept = self.kept_of(inputs // width) if inputs >= width else 0
            return BlockSparseTensor.planned(
                spec, height=height, width=width, kept=kept, values=values
            )
        kept = self.kept_of(spec.size)
        if self.prune == "wanda":  # compares within each output
            kept = spec.size // inputs * self.kept_of(inputs)
        return BitmaskTensor.planned(spec, kept=kept, values=values)

    def require_pattern(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where the pattern doesn't fit `[*out, I]`, or keeps nothing of it."""
        inputs = shape[-1]
        if self.tile:
            check_tiles(shape, *self.tile)
            self.kept_of(inputs // self.tile[1])
        elif self.n_of_m:
            among = self.n_of_m[1]
            if inputs % among:
                raise ValueError(f"pattern {self.pattern} does not divide {inputs} inputs")
            group = self.group_of(inputs)
            if self.prune == "sparsegpt" and group % among:
                raise ValueError(
                    f"sparsegpt decides a group's inputs together, and pattern {self.pattern} does "
                    f"not divide groups of {group} inputs: take another M or another group"
                )
        elif self.prune != "none":
            self.kept_of(inputs if self.prune == "wanda" else math.prod(shape))


def planned_leaf(path: str, spec: ParamSpec, scheme: Scheme) -> CompressedTensor | ParamSpec:
    """`scheme.plan(spec)`; its errors name the weight."""
    try:
        return scheme.plan(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
