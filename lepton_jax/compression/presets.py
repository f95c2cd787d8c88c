"""The named combinations behind `compression.preset`, and their application to a model's
parameters.

A preset is a list of rules. Norm scales, biases and expert routers stay as they are: they cost
nothing and routing is sensitive to them. In w8a8 the inputs of the gated half of the ffn and of the
attention's output are int8; those of the other products keep their precision, because they have
outliers: on SmolLM2-135M, KL to float32 over prose is 0.038 with int8 activations everywhere,
0.013 so, and 0.004 with none; with scales for 32 inputs in the same weights 0.0017
(tests/test_quality_int8.py measures it). int4 rounds to nearest because ranges of least squared
error cut the large weights that matter: KL 0.52 instead of 0.51, and 0.66 instead of 0.58.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.rules import Rule, assign, weights_of
from lepton_jax.compression.scheme import Scheme, planned_leaf
from lepton_jax.tensors import ParamSpec, Region

_SENSITIVE = r"embed|head|layers\.\d+\.(qkv|down|experts_down)"
_TOLERANT = r"layers\.\d+\.(out|gate_up|experts_gate_up)"
_UNCHANGED = Scheme(weights="keep")
_TABLES = "embed|head"
_PRODUCTS = r"layers\.\d+\.(qkv|out|gate_up|down|experts_gate_up|experts_down)"

PRESETS: dict[str, list[Rule[Scheme]]] = {
    "none": [],
    "int8": [Rule(f"{_SENSITIVE}|{_TOLERANT}", Scheme())],
    "w8a8": [Rule(_SENSITIVE, Scheme()), Rule(_TOLERANT, Scheme(activations="dynamic"))],
    "int8_g32": [Rule(_SENSITIVE, Scheme(group=32)), Rule(_TOLERANT, Scheme())],
    "int4": [Rule(_TABLES, Scheme()), Rule(_PRODUCTS, Scheme("int4", group=128))],
    "fp8": [
        Rule(_SENSITIVE, Scheme("float8")),
        Rule(_TOLERANT, Scheme("float8", activations="dynamic")),
    ],
}


def preset_rules(name: str) -> list[Rule[Scheme]]:
    """The rules of a preset. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"compression.preset={name!r} is unknown: allowed are {known}")
    return PRESETS[name]


def scheme_of_each(
    rules: Sequence[Rule[Scheme]], specs: Mapping[str, ParamSpec]
) -> dict[str, Scheme]:
    """The scheme of each weight that changes. Raises ValueError on rules that nothing uses."""
    actions = assign(rules, weights_of(specs))
    return {path: scheme for path, scheme in actions.items() if scheme != _UNCHANGED}


@dataclasses.dataclass(frozen=True)
class Compressor:
    """What the loader applies to each parameter: the schemes of those that change."""

    schemes: Mapping[str, Scheme]

    def __call__(self, path: str, spec: ParamSpec, array: jax.Array) -> Any:
        """The leaf of a parameter, or of a region that it `divides` into."""
        scheme = self.schemes.get(path)
        return array if scheme is None else compress_weight(array, scheme)

    def divides(self, path: str, spec: ParamSpec, region: Region) -> bool:
        """Whether the leaf of this region is what lies there in the leaf of the parameter."""
        scheme = self.schemes.get(path)
        return scheme is None or scheme.divides(spec.shape[-1], *region.bounds[-1])


def compressor(rules: Sequence[Rule[Scheme]], specs: Mapping[str, ParamSpec]) -> Compressor:
    """For the loader, of a model with these specs.

    Raises ValueError as `compress_specs`, before a weight is read.
    """
    compress_specs(rules, specs)
    return Compressor(scheme_of_each(rules, specs))


def compress_specs(rules: Sequence[Rule[Scheme]], specs: Mapping[str, ParamSpec]) -> dict:
    """The specs of the compressed model, without touching a weight.

    Raises ValueError on rules that nothing uses, and naming the weight where a scheme doesn't fit.
    """
    actions = scheme_of_each(rules, specs)
    return {
        path: planned_leaf(path, spec, actions[path]) if path in actions else spec
        for path, spec in specs.items()
    }
