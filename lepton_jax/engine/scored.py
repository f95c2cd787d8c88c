"""What a request to score asks, and how its results come together from the chunks of its prefill.

No loop of decoding: a prompt's log-probabilities and hidden states are there once it is prefilled,
some with each chunk. Plain data and numpy, no jax. The device's side is `scoring.py`; when a
request runs is `scheduler.py`'s to say.
"""

import dataclasses

import numpy as np

POOLS = ("", "last", "mean")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What is asked of a prompt instead of new tokens.

    Attributes:
      targets: for each of the prompt's last `len(targets)` places the ids whose log-probabilities
        after it are asked, one or more a place. So a text of n ids is scored as a prompt of its
        first n - 1 with the next id of each place: its own last id needs no computing.
      pool: "last" asks for the hidden state of the last token, "mean" for the mean of all.
      layer: the hidden state after so many layers, 0 the embeddings; -1, like the number of all
        layers: after the final norm.
    """

    targets: tuple[tuple[int, ...], ...] = ()
    pool: str = ""
    layer: int = -1

    def __post_init__(self):
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown: want one of {POOLS}")
        if self.layer < -1 or (self.layer >= 0 and not self.pool):
            raise ValueError(f"layer={self.layer}: want -1, or with a pool 0 or more")
        if not self.targets and not self.pool:
            raise ValueError("nothing is asked: give targets, or a pool for the hidden state")
        if not all(self.targets):
            raise ValueError("a place without targets: want one id or more at each")

    @property
    def width(self) -> int:
        """Most targets of a place."""
        return max(map(len, self.targets), default=0)


@dataclasses.dataclass(frozen=True)
class ScoreSpec:
    """What a program gives: log-probabilities of up to `targets` ids a place (0: none; otherwise a
    power of 4), and hidden states where `pool`, also those between layers where `inner`.
    """

    targets: int = 0
    pool: bool = False
    inner: bool = False

    @classmethod
    def of(cls, scoring: Scoring) -> "ScoreSpec":
        """The least spec that serves a request: few widths mean few compiled programs."""
        targets = 1 if scoring.targets else 0
        while targets < scoring.width:
            targets *= 4
        return cls(targets, bool(scoring.pool), scoring.layer >= 0)

    def union(self, other: "ScoreSpec") -> "ScoreSpec":
        """The least spec that serves both."""
        targets = max(self.targets, other.targets)
        return ScoreSpec(targets, self.pool or other.pool, self.inner or other.inner)

    @property
    def guided(self) -> str:
        """As of `SamplingParams`: nothing prescribes what a prompt to score is."""
        return ""

    @property
    def max_tokens(self) -> int:
        """In a workload it stands where SamplingParams do: nothing is generated."""
        return 0


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """What a scoring prefill gave.

    Attributes:
      logprobs: float32 `[places, C]`, a line for each scored place of the plan's chunks in order;
        None, like the next one, where no row asks.
      greedy: bool `[places, C]`: no id is likelier.
      pooled: float32 `[chunks, D]`, each chunk's part of its prompt's hidden state; None where no
        row asks.
    """

    logprobs: np.ndarray | None = None
    greedy: np.ndarray | None = None
    pooled: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class Scored:
    """What was asked of a prompt.

    Attributes:
      logprobs: float32 `[places, width]`, of the targets of each place; meaningless beyond them.
      greedy: bool `[places, width]`: no id is likelier than the target.
      pooled: float32 `[D]`, the hidden state of the asked layer; None where not asked.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    pooled: np.ndarray | None = None

    @classmethod
    def empty(cls, scoring: Scoring) -> "Scored":
        shape = len(scoring.targets), scoring.width
        return cls(np.zeros(shape, np.float32), np.zeros(shape, bool))

    def add(self, result: ScoreResult, *, lines: range, first: int) -> None:
        """Takes over these lines of a result; the first of them is the place `first` of our own."""
        where, lines = slice(first, first + len(lines)), slice(lines.start, lines.stop)
        width = self.logprobs.shape[1]
        self.logprobs[where] = result.logprobs[lines, :width]
        self.greedy[where] = result.greedy[lines, :width]

    def add_pooled(self, part: np.ndarray) -> None:
        self.pooled = part if self.pooled is None else self.pooled + part

    def is_finite(self, scoring: Scoring) -> bool:
        """Whether everything that was asked is a number; the likeliest -inf is one, NaN isn't."""
        counts = np.array([len(ids) for ids in scoring.targets], np.int32)
        asked = np.arange(self.logprobs.shape[1]) < counts[:, None]
        pooled = self.pooled is None or np.isfinite(self.pooled).all()
        return bool(pooled) and not np.isnan(self.logprobs[asked]).any()
