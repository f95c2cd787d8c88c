"""Two engines of a cascade as one `TokenEngine`: a compressed model's, with the dense one's beside.

Requests go to the compressed model, so what isn't asked in two steps is served as if it were alone;
who wants the dense model asks `dense` (`lepton_jax/jobs/cascade.py`). Either may be a pool.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.config import SamplingParams
from lepton_jax.engine.protocol import TokenEngine
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scoring


class CascadeEngine:
    """`compressed` answers; `dense` is an engine of its own. Both forget together."""

    def __init__(self, compressed: TokenEngine, dense: TokenEngine):
        self.compressed, self.dense = compressed, dense
        self.max_len = compressed.max_len
        self.pages = (*compressed.pages, *dense.pages)

    def add_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
    ) -> None:
        """Queues a request of the compressed model. Raises ValueError as it does."""
        self.compressed.add_request(request_id, prompt_ids, params)

    def add_scoring(self, request_id: str, prompt_ids: Sequence[int], scoring: Scoring) -> None:
        """Queues a prompt for the compressed model to score. Raises ValueError as it does."""
        self.compressed.add_scoring(request_id, prompt_ids, scoring)

    def step(self) -> list[StepOutput]:
        """One beat of the compressed model."""
        return self.compressed.step()

    def abort(self, request_id: str) -> None:
        """Drops a request of the compressed model."""
        self.compressed.abort(request_id)

    def forget(self) -> None:
        """As if neither had served anything. Raises ValueError while a request is open."""
        self.compressed.forget()
        self.dense.forget()

    @property
    def has_work(self) -> bool:
        """Whether the compressed model has."""
        return self.compressed.has_work

    def stats(self) -> Mapping[str, Any]:
        """Sums of both engines' counts and seconds."""
        both = [self.compressed.stats(), self.dense.stats()]  # a pool without a beat has none
        names = [n for each in both for n, value in each.items() if isinstance(value, int | float)]
        return {name: sum(each.get(name, 0) for each in both) for name in names}

    def close(self) -> None:
        """Closes both."""
        self.compressed.close()
        self.dense.close()
