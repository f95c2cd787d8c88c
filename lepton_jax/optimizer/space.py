"""What a search may choose: candidates are changes of a config's fields, never of fields that were
given.

What is only worth a try on the best candidate, such as speculation, is in `refine.py`.
"""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lepton_jax.config import RunConfig

PRESETS = ("int8_g32", "int8", "w8a8", "int4")
KV_DTYPES = ("auto", "bfloat16", "int8", "float8_e4m3fn")
DIMENSIONS: Mapping[str, tuple] = {
    "engine.rows": (4, 8, 16, 32, 64, 128),
    "engine.decode_block": (2, 4, 8, 16, 32),
    "engine.prefill_chunk": (256, 512, 1024),
}
SHARING: Mapping[str, tuple] = {"engine.page_size": (16, 64)}  # where prompts begin alike
PRECISION = ("compression.preset", "engine.kv_dtype")
MESH = ("mesh.data", "mesh.model")
Axes = Mapping[tuple[str, ...], Sequence[tuple]]  # fields that vary together, and their values


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Fields ("section.field") with their values, sorted by name."""

    fields: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Candidate":
        return cls(tuple(sorted(fields.items())))

    def changed(self, fields: Mapping[str, Any]) -> "Candidate":
        """With other values of some fields, or with more of them."""
        return Candidate.of(dict(self.fields) | fields)

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with these fields. Raises ValueError on a value that is not allowed."""
        return with_fields(config, dict(self.fields))

    def text(self) -> str:
        """Without the sections."""
        return " ".join(f"{name.partition('.')[2]}={value}" for name, value in self.fields)

    def flags(self) -> str:
        """As a driver's command line takes them."""
        return " ".join(shlex.quote(f"--config.{n}={_as_flag(v)}") for n, v in self.fields)


def _as_flag(value: Any) -> str:
    return (",".join(map(str, value)) or "()") if isinstance(value, tuple) else str(value)


def with_fields(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """A config with some fields changed, named "section.field"."""
    sections: dict[str, dict] = {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


def field_of(config: RunConfig, name: str) -> Any:
    """The value of "section.field"."""
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def axes(
    *,
    requests: int,
    precisions: Sequence[tuple[str, str]],
    devices: int,
    shared: bool,
    expert: int = 1,
) -> Axes:
    """What varies.

    Args:
      requests: of the workload; more rows than these aren't tried.
      precisions: (preset, dtype of the cache) that keep the accuracy, besides the config's own.
      devices: that the model may be spread over.
      shared: prompts begin alike.
      expert: `mesh.expert`, which stays and divides the devices of a model.
    """
    lines = DIMENSIONS | (SHARING if shared else {})
    found: dict[tuple[str, ...], Sequence[tuple]] = {
        (name,): [(value,) for value in values] for name, values in lines.items()
    }
    found["engine.rows",] = [(n,) for n in DIMENSIONS["engine.rows"] if n < 2 * requests]
    counts = [2**n for n in range(devices.bit_length())]
    pairs = itertools.product(counts, counts)
    found[MESH] = [p for p in pairs if math.prod(p) <= devices and p[1] % expert == 0]
    found[PRECISION] = precisions
    return found


def space(config: RunConfig, choices: Axes, *, given: Collection[str]) -> list[Candidate]:
    """All candidates, the config itself first; its own values are among those tried.

    `given` are fields that the user set: they stay.
    """
    columns = []
    for names, values in choices.items():
        own = tuple(field_of(config, name) for name in names)
        stay = [n for n, name in enumerate(names) if name in given]
        open_values = [v for v in values if all(v[n] == own[n] for n in stay)]
        pairs = [own, *(v for v in open_values if v != own)]
        columns.append([dict(zip(names, pair, strict=True)) for pair in pairs])
    return [
        Candidate.of({name: value for part in parts for name, value in part.items()})
        for parts in itertools.product(*columns)
    ]
