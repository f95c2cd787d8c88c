"""What was decided while a job ran, with the numbers behind it: as JSON lines and in words."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

PROGRAM = "decode_program"  # the "knob" of a decision to compile another, by its rows


@dataclasses.dataclass(frozen=True)
class Decision:
    """A knob that was turned, speculation switched, or a program compiled.

    Attributes:
      beat: of the engine, counted from the beginning of its block of rows.
      knob: its name; it went from `before` to `after`. "draft": tokens proposed in a step.
      why: in words; `numbers` are those behind it.
      replica: whose engine it is, from 0.
      block: of rows that are computed together, from 0; where a job isn't exact there is one.
    """

    beat: int
    knob: str
    before: float
    after: float
    why: str
    numbers: Mapping[str, float]
    replica: int = 0
    block: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def in_words(self, *, several: bool = False) -> str:
        """One line for people, of `several` replicas with its number."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
        turned = f"{self.knob} {_shown(self.before)} -> {_shown(self.after)}"
        whose = f" of replica {self.replica}" if several else ""
        where = f"block {self.block}, beat {self.beat}" if self.block else f"beat {self.beat}"
        return f"{where}{whose}: {turned}: {self.why} ({numbers})"


def explained(decisions: Sequence[Decision], *, most: int = 40) -> str:
    """All decisions in words; of very many the first and the last."""
    if not decisions:
        return "no knob was turned"
    several = any(decision.replica for decision in decisions)
    lines = [decision.in_words(several=several) for decision in decisions]
    if len(lines) > most:
        half = most // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more ...", *lines[-half:]]
    return "\n".join(lines)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"
