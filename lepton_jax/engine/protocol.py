"""What those above ask of an engine, and what an engine refuses: one engine or a pool of them.

`TokenEngine` is all that jobs, sessions and servers may use; `Limits` says before anything is
queued which requests can never be served, also for an engine that is in another process.
Read next: `loop.py` (the engine), `lepton_jax/distributed/pool.py` (many of them).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lepton_jax.config import SamplingParams
from lepton_jax.engine.request import Plan, StepOutput
from lepton_jax.engine.scored import ScoreSpec, Scoring
from lepton_jax.models.config import NO_HEAD


class TokenEngine(Protocol):
    """Requests of token ids in, tokens and scores out. `max_len` bounds prompt and output; `pages`
    are those of each of its caches.
    """

    max_len: int
    pages: Sequence[int]

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queues a request. Raises ValueError, saying why, on one that can never be served."""

    def add_scoring(self, request_id: str, prompt_ids: Sequence[int], scoring: Scoring) -> None:
        """Queues a prompt to score. Raises ValueError as above."""

    def step(self) -> list[StepOutput]:
        """One beat; what came of it or of the one before."""

    def abort(self, request_id: str) -> None:
        """Drops a request wherever it is; nothing more comes out for it."""

    def forget(self) -> None:
        """As if nothing had been served. Raises ValueError while a request is open."""

    @property
    def has_work(self) -> bool:
        """Whether another step can produce something."""

    def stats(self) -> Mapping[str, Any]:
        """Counts and seconds since the engine was made (`telemetry.StepStats.of`)."""


class Sync(Protocol):
    """What an engine asks of the other hosts that run the same program (`distributed/hosts.py`)."""

    def share(self, value: Any) -> Any:
        """Host 0's value, on all hosts."""

    def agree(self, plan: Plan | None) -> None:
        """Before a plan is dispatched. Raises RuntimeError where it isn't host 0's."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine can serve, in ids, tokens and pages; one page is the null page."""

    vocab_size: int
    max_len: int
    page_size: int
    num_pages: int
    num_layers: int
    has_head: bool = True

    def check_request(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError on a request that can never be served."""
        self.check_head(params)
        self.check_ids(prompt_ids, "the prompt")
        self.check_ids(params.stop_token_ids, "sampling.stop_token_ids")
        self.check_ids(params.logit_bias, "sampling.logit_bias")
        check_room(
            len(prompt_ids),
            params.max_tokens,
            max_len=self.max_len,
            page_size=self.page_size,
            num_pages=self.num_pages,
        )

    def check_scoring(self, prompt_ids: Sequence[int], scoring: Scoring) -> None:
        """Raises ValueError on a prompt that can never be scored."""
        self.check_head(scoring)
        self.check_ids(prompt_ids, "the prompt")
        self.check_ids(itertools.chain(*scoring.targets), "what is scored")
        if scoring.layer > self.num_layers:
            raise ValueError(f"layer={scoring.layer}, but the model has {self.num_layers} layers")
        if len(scoring.targets) > len(prompt_ids):
            raise ValueError(
                f"targets of {len(scoring.targets)} places of {len(prompt_ids)} tokens"
            )
        check_room(
            len(prompt_ids),
            None,
            max_len=self.max_len,
            page_size=self.page_size,
            num_pages=self.num_pages,
        )

    def check_head(self, asked: SamplingParams | Scoring | ScoreSpec) -> None:
        """Raises ValueError where logits are asked of a model without an output head."""
        if needs_head(asked) and not self.has_head:
            raise ValueError(f"the model {NO_HEAD}")

    def check_ids(self, ids: Iterable[int], where: str) -> None:
        """Raises ValueError on an id that the model doesn't know, and says where it is."""
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(
                f"{where} has token id {bad}, which is outside the model's vocabulary of "
                f"{self.vocab_size}: want ids of this model's tokenizer"
            )


def needs_head(asked: SamplingParams | Scoring | ScoreSpec) -> bool:
    """Whether logits are needed for what is asked of a prompt."""
    return isinstance(asked, SamplingParams) or bool(asked.targets)


def check_room(
    count: int, max_tokens: int | None, *, max_len: int, page_size: int, num_pages: int
) -> int:
    """The most outputs of a prompt of `count` tokens; `max_tokens` is None for one to score.

    Raises ValueError, with the numbers, where it can never run.
    """
    if not count:
        raise ValueError("the prompt has no tokens: want at least one")
    most = max_len - (max_tokens is not None)  # a prompt to score needs no output
    if count > most:
        raise ValueError(
            f"the prompt has {count} tokens, but engine.max_len={max_len} leaves room for"
            f" {most}: shorten it or raise engine.max_len"
        )
    limit = 0 if max_tokens is None else min(max_tokens, max_len - count)
    pages = -(-(count + max(limit - 1, 0)) // page_size)
    if pages > num_pages - 1:
        raise ValueError(
            f"a prompt of {count} tokens and {limit} outputs need {pages} pages of"
            f" {page_size} tokens, but there are {num_pages - 1}: raise"
            f" engine.num_pages or lower max_tokens"
        )
    return limit
