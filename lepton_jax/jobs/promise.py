"""The promise of a cascade: in how many rows its choice is the dense model's, kept by counting.

The compressed model's choice stands where its margin (of the best over the second) is above a
threshold. Both models answer the first rows, the calibration; the threshold is the lowest under
which so few of them would have differed that the exact 95 % interval of their share (Clopper and
Pearson 1934) is within the promise. That holds although the threshold is chosen among all, because
fewer rows differ under a higher one (Bates et al. 2021, "Distribution-Free, Risk-Controlling
Prediction Sets"). Afterwards some of the rows that stand, by a hash of their keys, are audited:
answered by both. Where these show the promise broken, calibration begins anew, and the threshold
never falls.

All state follows the rows of the output in their order: a resumed job has it again after reading
them. No engine, no text. Read next: `cascade.py`.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lepton_jax.config import CascadeSection

log = logging.getLogger(__name__)

_TAIL = 0.025  # beyond each end of an interval
_BROKEN = math.log(40)  # evidence at which a promise counts as broken
_CALIBRATION = 2  # times the fewest rows: if some may differ, fewer rows need the dense model


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an output row says of how it was answered.

    Attributes:
      model: whose answer it is: "compressed" or "dense".
      why: "sure"; or why the dense model was asked: "calibration", "unsure" or "audit".
      margin: of the compressed model; 0 where it gave no answer.
      same: whether both chose the same; None where the dense one wasn't asked.
    """

    model: str
    why: str
    margin: float
    same: bool | None


class Promise:
    """How rows are shared between the models so that a promised agreement is kept.

    Attributes:
      threshold: margins above it stand; infinite until the first calibration is done.
      thresholds: that were in force so far, one after each calibration.
    """

    def __init__(self, section: CascadeSection):
        """Raises ValueError where so few calibration rows can't show the agreement."""
        self._risk, self._audit = 1 - section.agreement, section.audit
        least = fewest_rows(section.agreement)
        self._rows = section.calibration or _CALIBRATION * least
        if self._rows < least:
            shown = 1 - clopper_pearson(0, self._rows)[1]
            raise ValueError(
                f"cascade.calibration={self._rows} rows can't show "
                f"cascade.agreement={section.agreement:g}: if not one of them differs, that shows "
                f"{shown:.4f}. Give {least} rows or more (0: {_CALIBRATION * least}), or a lower "
                "agreement"
            )
        self.threshold = math.inf
        self.thresholds: list[float] = []
        self._pairs: list[tuple[float, bool]] = []  # (margin, same) of the calibration so far
        self._calibrating = True
        self._evidence = 0.0
        self._recent = Counter()  # rows by why since the last calibration
        self._all = Counter()  # of the whole output, and "differing" audits

    def why_dense(self, key: str, margin: float) -> str:
        """Why the dense model shall answer a row; "" where the compressed one's answer stands."""
        if self._calibrating:
            return "calibration"
        if margin <= self.threshold:
            return "unsure"
        return "audit" if _draw(key) < self._audit else ""

    def observe(self, verdict: Verdict) -> None:
        """Takes the next row of the output, also of one that an earlier run has written."""
        self._all[verdict.why] += 1
        if self._calibrating:
            if verdict.why == "calibration":
                self._pairs.append((verdict.margin, bool(verdict.same)))
                if len(self._pairs) == self._rows:
                    self._fit()
            return
        self._recent[verdict.why] += 1
        if verdict.why == "audit":
            self._all["differing"] += not verdict.same
            self._weigh(differs=not verdict.same)

    def account(self) -> dict[str, Any]:
        """What became of the promise, over the whole output, in JSON types.

        `agreement` is estimated from the audits, with its exact 95 % interval: answers of the dense
        model agree, and of those that stand as many differ as of the audited. None without rows.
        """
        counts = {name: self._all[name] for name in ("sure", "unsure", "calibration", "audit")}
        rows, audits = sum(counts.values()), counts["audit"]
        differing = self._all["differing"]
        stand = counts["sure"] / rows if rows else 0.0
        low, high = clopper_pearson(differing, audits)
        shares = {"mean": differing / max(audits, 1), "low": high, "high": low}
        agreement = {name: round(1 - stand * share, 6) for name, share in shares.items()}
        return {
            "promised": round(1 - self._risk, 6),
            "calibration": self._rows,
            "agreement": agreement if rows else None,
            "rows": counts,
            "differing_audits": differing,
            "escalated": round(counts["unsure"] / max(rows - counts["calibration"], 1), 6),
            "thresholds": self.thresholds,
        }

    def _weigh(self, *, differs: bool) -> None:
        """Adds an audit to the evidence that the promise is broken: a cumulative sum of log
        likelihood ratios that doesn't fall below 0, of the odds to differ being three times what
        the promise allows (Page 1954, "Continuous Inspection Schemes"). So many good rows don't
        hide the bad ones that come later.
        """
        stand = self._recent["sure"] + self._recent["audit"]
        allowed = min(1.0, self._risk * (1 + self._recent["unsure"] / stand))
        self._evidence += math.log(3) * differs - math.log1p(2 * allowed)
        self._evidence = max(0.0, self._evidence)
        if self._evidence >= _BROKEN:
            log.warning(
                "cascade: %d of %d audited rows differ from the dense model so far, of late too "
                "many for the promised %g: the next %d rows are answered by both",
                self._all["differing"],
                self._all["audit"],
                1 - self._risk,
                self._rows,
            )
            self._calibrating, self._pairs = True, []

    def _fit(self) -> None:
        """Ends a calibration: the lowest threshold under which few enough rows differ."""
        chances = _at_most(self._rows, self._risk)
        allowed = sum(1 for _ in itertools.takewhile(lambda chance: chance <= _TAIL, chances)) - 1
        differing = sorted((margin for margin, same in self._pairs if not same), reverse=True)
        found = differing[allowed] if len(differing) > allowed else 0.0
        self.threshold = max([found, *self.thresholds])
        self.thresholds.append(self.threshold)
        stand = sum(margin > self.threshold for margin, _ in self._pairs) / self._rows
        log.warning(
            "cascade: of %d rows answered by both models %d differ; the compressed one answers "
            "where its margin is above %g, which was so in %.0f %% of them",
            self._rows,
            len(differing),
            self.threshold,
            100 * stand,
        )
        self._calibrating, self._pairs = False, []
        self._recent, self._evidence = Counter(), 0.0


def fewest_rows(agreement: float) -> int:
    """Rows that show an agreement if not one of them differs."""
    return math.ceil(math.log(_TAIL) / math.log(agreement))


def clopper_pearson(count: int, rows: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, of which `count` of so many rows were seen."""
    low, high = 0.0, 1.0
    if count:
        low = _root(lambda share: 1 - _chance(count - 1, rows, share), _TAIL)
    if count < rows:
        high = _root(lambda share: 1 - _chance(count, rows, share), 1 - _TAIL)
    return low, high


def _root(rising: Callable[[float], float], value: float) -> float:
    """Where a function of 0 to 1 that rises has a value, by halving."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high


def _chance(count: int, rows: int, share: float) -> float:
    """That at most `count` of so many independent rows are of a kind with this share."""
    return next(itertools.islice(_at_most(rows, share), count, None))


def _at_most(rows: int, share: float) -> Iterator[float]:
    """That at most 0, 1, ... of them are: sums of the binomial distribution."""
    odds = math.log(share) - math.log1p(-share)
    term, total = rows * math.log1p(-share), 0.0
    for number in range(rows):
        total += math.exp(term)
        yield total
        term += math.log((rows - number) / (number + 1)) + odds
    yield 1.0


def _draw(key: str) -> float:
    """A number from 0 to 1 that depends on the key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"audit").digest()
    return int.from_bytes(digest, "big") / 2**64
