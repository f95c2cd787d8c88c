"""What `bench` and `scripts/compare_peers.py` measure: sizes and prompts of workloads, no model.

Prompts are random token ids: no two share a prefix, so a prefix cache gains nothing, and every
engine gets the same ones. A seed gives the same prompts on every machine. Measuring is in
`benchmark.py`. Nothing here imports jax.
"""

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Workload:
    """`requests` prompts of `prompt_tokens` tokens in all, each continued by `new` greedy tokens.

    Attributes:
      kind: what is timed: "decode" (the tokens after all rows have begun), "prefill" (prompt
        tokens up to the first outputs) or "job" (generated tokens, from the first request to the
        last output).
      rows: requests decoded at once; 0 leaves it to the engine's config.
      varied: prompts differ in length, otherwise all have the same.
    """

    name: str
    kind: str
    requests: int
    prompt_tokens: int
    new: int
    rows: int = 0
    varied: bool = False

    def prompts(self, seed: int, vocab: int) -> list[list[int]]:
        """Token ids from 0 to `vocab` - 1; lengths are the same for every seed."""
        draw = random.Random(f"{self.name}:{seed}")
        return [[draw.randrange(vocab) for _ in range(count)] for count in self.lengths()]

    def lengths(self) -> list[int]:
        """Tokens of each prompt; they add up to `prompt_tokens`."""
        if not self.varied:
            return [self.prompt_tokens // self.requests] * self.requests
        draw = random.Random(self.name)
        shares = [draw.lognormvariate(0, 0.6) for _ in range(self.requests)]
        scale = (self.prompt_tokens - self.requests) / sum(shares)
        counts = [1 + int(share * scale) for share in shares]
        for place in range(self.prompt_tokens - sum(counts)):
            counts[place] += 1
        return counts

    @property
    def counted(self) -> int:
        """Tokens that the figure counts, where each row's first output ends its prefill."""
        if self.kind == "prefill":
            return self.prompt_tokens
        return self.requests * (self.new - (self.kind == "decode"))


def _decode(rows: int) -> Workload:
    return Workload(f"decode_{rows}", "decode", rows, 128 * rows, 128, rows)


def _prefill(requests: int) -> Workload:
    return Workload(f"prefill_512x{requests}", "prefill", requests, 512 * requests, 1, requests)


WORKLOADS = {
    workload.name: workload
    for workload in (
        _decode(1),
        _decode(8),
        _decode(32),
        _prefill(1),
        _prefill(8),
        Workload("job", "job", 256, 27_762, 64, varied=True),
    )
}

STARTS = "starts"  # cold and warm start
FIRST_TOKEN = "first_token"  # what a start's process runs; not among "all"


def select(measure: str) -> list[str]:
    """Names in a comma-separated list, or all. Raises ValueError on an unknown one."""
    everything = [STARTS, *WORKLOADS]
    if measure == "all":
        return everything
    names = [name.strip() for name in measure.split(",")]
    for name in names:
        if name not in (*everything, FIRST_TOKEN):
            allowed = ", ".join(["all", *everything])
            raise ValueError(f"bench.measure={name!r} is unknown: allowed are {allowed}")
    return names
