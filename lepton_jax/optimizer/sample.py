"""A sample of a workload: requests as the engine takes them, and what class of workload they are.

Profiles are kept by class, so that a job like an earlier one finds what was measured for it.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence

from lepton_jax.config import SamplingParams
from lepton_jax.engine.scored import ScoreSpec, Scoring

_SHARED = 16  # tokens that most prompts must begin with alike


@dataclasses.dataclass(frozen=True)
class SampledRequest:
    """A prompt's ids and what is asked of it: outputs, or `Scoring`."""

    prompt_ids: tuple[int, ...]
    asked: SamplingParams | Scoring

    @property
    def work(self) -> tuple[int, SamplingParams | ScoreSpec]:
        """As `Engine.warm_up` takes it."""
        scores = isinstance(self.asked, Scoring)
        return len(self.prompt_ids), ScoreSpec.of(self.asked) if scores else self.asked

    @property
    def limit(self) -> int:
        """Most outputs."""
        return 0 if isinstance(self.asked, Scoring) else self.asked.max_tokens


def require_rows(requests: Sequence[SampledRequest]) -> None:
    """Raises ValueError where there is nothing to measure."""
    if not requests:
        raise ValueError(
            "the workload's sample is empty: give rows that the engine can serve (job.input)"
        )


def workload_class(requests: Sequence[SampledRequest]) -> str:
    """Names the class: how many rows, how long prompts and answers are, in powers of 4, whether
    lengths vary much, whether prompts share a beginning.
    """
    require_rows(requests)
    prompts = [len(request.prompt_ids) for request in requests]
    limits = [request.limit for request in requests]
    parts = [
        "score" if not max(limits) else f"new{_power(statistics.median(limits))}",
        f"prompt{_power(statistics.median(prompts))}",
        f"rows{_power(len(requests))}",
    ]
    if max(prompts) > 4 * statistics.median(prompts) or max(limits) > 4 * statistics.median(limits):
        parts.append("tailed")
    if shares_beginnings(requests):
        parts.append("shared")
    return "-".join(parts)


def shares_beginnings(requests: Sequence[SampledRequest]) -> bool:
    """Whether most prompts begin with the same tokens."""
    beginnings = Counter(request.prompt_ids[:_SHARED] for request in requests)
    return max(beginnings.values()) > len(requests) / 2 > 1


def _power(count: float) -> int:
    """The power of 4 that is nearest from above."""
    return 4 ** math.ceil(math.log(max(count, 1), 4))
