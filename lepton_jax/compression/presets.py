"""The named combinations behind `compression.preset`, and their application to a model's
parameters.

A preset is a list of rules. Norm scales, biases and expert routers stay as they are: they cost
nothing and routing is sensitive to them. In w8a8 the inputs of the gated half of the ffn and of the
attention's output are int8; those of the other products keep their precision, because they have
outliers: on SmolLM2-135M, KL to float32 over prose is 0.038 with int8 activations everywhere,
0.013 so, and 0.004 with none (tests/test_quality_int8.py measures it).
"""

from collections.abc import Callable, Mapping

from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.rules import Rule, assign
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import ParamSpec

_SENSITIVE = r"embed|head|layers\.\d+\.(qkv|down|experts_down)"
_TOLERANT = r"layers\.\d+\.(out|gate_up|experts_gate_up)"

PRESETS: dict[str, list[Rule[Scheme]]] = {
    "none": [],
    "int8": [Rule(f"{_SENSITIVE}|{_TOLERANT}", Scheme())],
    "w8a8": [Rule(_SENSITIVE, Scheme()), Rule(_TOLERANT, Scheme(activations="dynamic"))],
}


def preset_rules(name: str) -> list[Rule[Scheme]]:
    """The rules of a preset. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"compression.preset={name!r} is unknown: allowed are {known}")
    return PRESETS[name]


def compressor(rules: list[Rule[Scheme]], paths) -> Callable:
    """`compress(path, spec, array) -> leaf` for the loader; `paths` are all parameter paths of the
    model.
    """
    actions = assign(rules, paths)

    def compress(path: str, spec: ParamSpec, array):
        scheme = actions.get(path)
        return array if scheme is None else quantize(array, scheme)

    return compress


def compress_specs(rules: list[Rule[Scheme]], specs: Mapping[str, ParamSpec]) -> dict:
    """The specs of the compressed model, without touching a weight."""
    actions = assign(rules, specs)
    return {
        path: actions[path].plan(spec) if path in actions else spec for path, spec in specs.items()
    }
