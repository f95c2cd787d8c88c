"""`Scheme`: what becomes of one weight, as a rule or a config names it, and what it needs for that.

A scheme is plain data; the arithmetic is in the module that its fields name (`quantize.py` and its
neighbours). Read next: `rules.py` (which weight gets which), `presets.py`.
"""

import dataclasses
from typing import Any

from lepton_jax.tensors import ParamSpec, QTensor

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
      sparsity: share of the weights that becomes 0; given by the pattern where that is "N:M".
      pattern: "unstructured", "N:M" (N kept of every M inputs, as "2:4"), or "RxC" (whole tiles of
        R outputs by C inputs, as "16x16").
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

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see activations first."""
        return self.rounding == "gptq" or self.activations == "static"

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a weight of `inputs` inputs; 0: all."""
        fitting = (size for size in range(self.group, 1, -1) if not (inputs % size or size % 2))
        group = next(fitting, 0)
        if self.group and not group:
            raise ValueError(f"scheme: no even group up to {self.group} divides {inputs} inputs")
        return group

    def plan(self, spec: ParamSpec) -> QTensor:
        """The leaf of ParamSpecs that a weight of this spec becomes."""
        return QTensor.planned(
            spec,
            values=_STORED[self.weights],
            group=self.group_of(spec.shape[-1]),
            asymmetric=self.asymmetric,
            static_activations=self.activations == "static",
            act_bits=16 if self.activations == "float" else 8,
        )

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for manifests and receipts."""
        return dataclasses.asdict(self)
