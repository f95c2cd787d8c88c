"""What a search may choose: candidates are changes of a config's fields, never of fields that were
given.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lepton_jax.config import RunConfig

PRESETS = ("int8_g32", "int8", "w8a8", "int4")
DIMENSIONS: Mapping[str, tuple] = {
    "engine.rows": (4, 8, 16, 32, 64, 128),
    "engine.decode_block": (4, 8, 16, 32),
    "engine.prefill_chunk": (256, 512, 1024),
}
SHARING: Mapping[str, tuple] = {"engine.page_size": (16, 64)}  # where prompts begin alike


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Fields ("section.field") with their values, sorted by name."""

    fields: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Candidate":
        return cls(tuple(sorted(fields.items())))

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with these fields. Raises ValueError on a value that is not allowed."""
        return with_fields(config, dict(self.fields))

    def text(self) -> str:
        """Without the sections."""
        return " ".join(f"{name.partition('.')[2]}={value}" for name, value in self.fields)


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


def space(
    config: RunConfig,
    *,
    given: Collection[str],
    presets: Sequence[str],
    requests: int,
    dimensions: Mapping[str, Sequence] = DIMENSIONS,
) -> list[Candidate]:
    """All candidates, the config itself first.

    Args:
      config: whose values are tried too.
      given: fields that the user set: they stay.
      presets: of compression to try, besides the config's own.
      requests: of the workload; more rows than these aren't tried.
      dimensions: fields and the values to try.
    """
    choices: dict[str, list] = {}
    for name, values in dimensions.items():
        own = field_of(config, name)
        more = [] if name in given else [v for v in values if v != own]
        if name == "engine.rows":
            more = [v for v in more if v < 2 * requests]
        choices[name] = [own, *more]
    own, compression = config.compression.preset, "compression.preset"
    free = not {compression, "compression.rules"} & set(given) and not config.compression.rules
    choices[compression] = [own, *(p for p in presets if free and p != own)]
    return [
        Candidate.of(dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]
