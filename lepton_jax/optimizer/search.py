"""The search before a job: candidates are dropped by memory and ordered by predicted time, and the
best few, as far as they keep the accuracy, are run on a sample of the real rows on the real device.

The config as it is comes first: it gives T0 and the costs that predictions begin with. Each trial
corrects them for the next choice. Candidates whose times are close run again, in turns. Read next:
`space.py`, `predict.py`, `trial.py`, `refine.py`, `turns.py`.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import psutil

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import MeshSection, RunConfig
from lepton_jax.engine.sizing import DEVICE_SHARE
from lepton_jax.models.build import Model
from lepton_jax.optimizer.accuracy import Accuracy, Precision
from lepton_jax.optimizer.found import Found, Tried
from lepton_jax.optimizer.predict import Outlook, Predictor
from lepton_jax.optimizer.refine import refinements
from lepton_jax.optimizer.sample import SampledRequest, require_rows, shares_beginnings
from lepton_jax.optimizer.shelf import Shelf
from lepton_jax.optimizer.space import (
    KV_DTYPES,
    MESH,
    PRECISION,
    PRESETS,
    Axes,
    Candidate,
    axes,
    field_of,
    space,
    with_fields,
)
from lepton_jax.optimizer.trial import Models, Trial, try_out
from lepton_jax.optimizer.turns import Finalist, close_ones, take_turns
from lepton_jax.tensors import CompressedTensor
from lepton_jax.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int, str], None]

_MARGIN = 1.15  # times the best score: what is predicted to be worse is not tried
_PROMISE = 0.97  # share of the seconds that a refinement must promise to leave at most
_KEPT_SHARE = 8  # of the memory: one part of so many may hold models that were tried


class Search:
    """One search over one config and sample."""

    def __init__(
        self,
        config: RunConfig,
        requests: Sequence[SampledRequest],
        tokenizer: Tokenizer,
        *,
        accuracy: Accuracy,
        given: Collection[str] = (),
        choices: Axes | None = None,
        margin: float = _MARGIN,
        progress: Progress = lambda stage, done, total, what: None,
    ):
        """Prepares.

        Args:
          choices: what varies, where that isn't everything.
          margin: a candidate that is predicted to be so many times worse than the best isn't tried.

        Raises ValueError where the sample is empty.
        """
        require_rows(requests)
        self._config, self._requests, self._tokenizer = config, requests, tokenizer
        self._accuracy, self._choices, self._progress = accuracy, choices, progress
        self._margin = margin
        self._given, self._asked = frozenset(given), config.optimizer
        if config.compression.rules or "compression.rules" in given:
            self._given |= {"compression.preset"}
        if config.engine.attention_block:
            self._given |= {"engine.page_size"}
        if config.engine.prefill_sizes:
            self._given |= {"engine.prefill_chunk"}
        self._budget = self._asked.memory or _device_memory()
        self._shelf = Shelf(self._budget // _KEPT_SHARE, progress)
        self._tried: list[Tried] = []
        self._too_coarse: dict[str, float] = {}
        self._unpredicted: Counter[str] = Counter()

    def run(self) -> Found:
        """Raises ValueError where no candidate keeps what was asked, naming the nearest."""
        config, (model, choices) = self._config, self._read()
        predictor = Predictor(model, self._requests)
        self._require_accurate(config, predictor)
        candidates = space(config, choices, given=self._given)
        outlooks = self._outlooks(predictor, candidates)
        fitting = self._fitting(outlooks)
        own = candidates[0]
        self._try(own, outlooks[own].seconds, predictor)
        left = [candidate for candidate in fitting if candidate != own]
        while left and len(self._tried) < self._asked.trials:
            outlooks = self._outlooks(predictor, fitting)
            left = [candidate for candidate in left if self._is_worth(candidate, outlooks)]
            if not left:
                break
            following = min(left, key=lambda c: self._promise(c, outlooks[c]))
            if self._promise(following, outlooks[following])[1] > self._margin * self._least():
                break
            precision = _precision(following.applied(config))
            if self._is_accurate(precision):
                left.remove(following)
                self._try(following, outlooks[following].seconds, predictor)
            else:
                left = [c for c in left if _precision(c.applied(config)) != precision]
        self._try_own_sizes(own, fitting, predictor)
        self._refine(predictor)
        best = self._best(self._take_turns(predictor))
        kl = self._accuracy.kl(_precision(best.candidate.applied(config)))
        return Found(
            best,
            tuple(self._tried),
            considered=len(candidates),
            too_large=len(candidates) - len(fitting) - self._unpredicted.total(),
            unpredicted=self._unpredicted,
            too_coarse=self._too_coarse,
            kl=None if config.compression.rules else kl,
            objective=self._asked.objective,
        )

    def _read(self) -> tuple[Model, Axes]:
        """The model without its weights, which only the shelf keeps, and what varies."""
        loaded = self._shelf.model(self._config)
        if self._asked.max_kl and not loaded.config.head_path:
            raise ValueError(
                f"optimizer.max_kl={self._asked.max_kl:g} is of predictions, and "
                f"{self._config.model.path} has no output head: set it to 0"
            )
        return loaded.model, self._axes(loaded)

    def _axes(self, loaded: Loaded) -> Axes:
        """What varies: precisions only as far as some divergence is allowed."""
        if self._choices is not None:
            return self._choices
        compressed = any(isinstance(leaf, CompressedTensor) for leaf in loaded.leaves)
        stays = compressed and self._config.compression.preset == "none"
        presets = ["none", *(() if stays else PRESETS)]
        free = self._asked.max_kl > 0 and not self._config.compression.rules
        return axes(
            requests=len(self._requests),
            precisions=list(itertools.product(presets, KV_DTYPES)) if free else [],
            devices=len(jax.local_devices()),
            shared=shares_beginnings(self._requests),
            expert=self._config.mesh.expert,
        )

    def _try_own_sizes(
        self, own: Candidate, fitting: Collection[Candidate], predictor: Predictor
    ) -> None:
        """Tries the best precision and mesh with the config's own sizes, whatever is predicted of
        their time: trials that went to several precisions say little about sizes.
        """
        fields = dict(self._best().candidate.fields)
        candidate = own.changed({n: v for n, v in fields.items() if n in (*PRECISION, *MESH)})
        if candidate not in fitting or any(one.candidate == candidate for one in self._tried):
            return
        finer = candidate.changed({"engine.kv_dtype": field_of(self._config, "engine.kv_dtype")})
        outlooks = self._outlooks(predictor, [c for c in {candidate, finer} if c in fitting])
        late, _ = self._promise(candidate, outlooks[candidate])
        if not late and self._is_worth(candidate, outlooks):
            self._try(candidate, outlooks[candidate].seconds, predictor)

    def _refine(self, predictor: Predictor) -> None:
        """Tries what promises something on the best candidate; what gains stays."""
        best = self._best()
        config = best.candidate.applied(self._config)
        asked = dict(predictor=predictor, given=self._given)
        for fields, share in list(refinements(config, best.trial, self._requests, **asked)):
            if share > _PROMISE:
                continue
            best = self._best()
            candidate = best.candidate.changed(fields)
            if predictor.outlook(candidate.applied(self._config)).memory <= self._budget:
                self._try(candidate, share * best.trial.seconds, predictor)

    def _outlooks(
        self, predictor: Predictor, candidates: Sequence[Candidate]
    ) -> dict[Candidate, Outlook]:
        found = {}
        for done, candidate in enumerate(candidates):
            if done % 64 == 0:
                self._progress("predict", done, len(candidates), candidate.text())
            config = candidate.applied(self._config)
            try:
                found[candidate] = predictor.outlook(config)
            except ValueError as error:
                if config == self._config:
                    raise
                self._unpredicted[str(error)] += 1
        return found

    def _fitting(self, outlooks: Mapping[Candidate, Outlook]) -> list[Candidate]:
        fitting = [c for c, outlook in outlooks.items() if outlook.memory <= self._budget]
        if not fitting:
            candidate = min(outlooks, key=lambda c: outlooks[c].memory)
            least = outlooks[candidate].memory
            raise ValueError(
                f"nothing fits into optimizer.memory={self._budget} bytes: the smallest candidate, "
                f"{candidate.text()}, needs {least}"
            )
        return fitting

    def _require_accurate(self, config: RunConfig, predictor: Predictor) -> None:
        own, most = _precision(config), self._asked.max_kl
        if most and config.mesh.model > 1 and not self._given.issuperset(PRECISION):
            self._require_whole(config, predictor)
        if not most or own == ("none", "auto") or "compression.preset" in self._given:
            return
        kl = self._accuracy.measure(own, self._load_whole)
        if kl > most:
            cache = f" with engine.kv_dtype={own[1]!r}" if own[1] != "auto" else ""
            raise ValueError(
                f"compression.preset={own[0]!r}{cache} diverges by {kl:.4f} nats a token, more than"
                f" optimizer.max_kl={most:g}: raise it, or give another preset or dtype"
            )

    def _require_whole(self, config: RunConfig, predictor: Predictor) -> None:
        """Raises ValueError where accuracy can't be measured because one device is too small."""
        dense = with_fields(config, {"compression.preset": "none", "compression.rules": ()})
        needed = predictor.weight_bytes(dataclasses.replace(dense, mesh=MeshSection()))
        if needed > _device_memory():
            raise ValueError(
                f"optimizer.max_kl is measured on one device, and the uncompressed model needs "
                f"{needed} bytes of its {_device_memory()}: leave optimizer.max_kl out and give "
                "compression.preset"
            )

    def _is_accurate(self, precision: Precision) -> bool:
        """Whether a precision that isn't the config's own keeps optimizer.max_kl."""
        if precision == _precision(self._config):
            return True
        if self._accuracy.kl(precision) is None:
            self._progress("accuracy", 0, 1, " ".join(precision))
        kl = self._accuracy.measure(precision, self._load_whole)
        if kl > self._asked.max_kl:
            self._too_coarse[" ".join(part for part in precision if part != "auto")] = kl
        return kl <= self._asked.max_kl

    def _load_whole(self, preset: str) -> Loaded:
        """On one device, because a decoder that isn't cut measures the accuracy."""
        config = with_fields(self._config, {"compression.preset": preset})
        return self._shelf.model(dataclasses.replace(config, mesh=MeshSection()))

    def _try(self, candidate: Candidate, seconds: float, predictor: Predictor) -> None:
        """Runs a candidate that is expected to take so many seconds."""
        config, repeats = candidate.applied(self._config), self._asked.repeats
        costs, outlook = predictor.costs(config), predictor.outlook(config)
        latency = self._asked.objective == "latency"
        self._progress("try", 0, repeats, candidate.text())
        trial = try_out(
            self._models(config),
            config,
            self._requests,
            tokenizer=self._tokenizer,
            plays=outlook.plays if self._tried else (),
            costs=costs,
            best=math.inf if latency else self._least() / self._paid(config),
            progress=lambda run: self._progress("try", run, repeats, candidate.text()),
        )
        predictor.learn(config, trial)
        costs, fits = predictor.costs(config), outlook.memory <= self._budget
        score = self._score(config, trial)
        self._tried.append(Tried(candidate, seconds, trial, costs, score, fits))

    def _models(self, config: RunConfig) -> Models:
        drafts = config.engine.speculation == "draft"
        return Models(self._shelf.model(config), self._shelf.draft(config) if drafts else None)

    def _take_turns(self, predictor: Predictor) -> list[Tried]:
        """Times the best again, together, where little parts them; these, as they were then."""
        good = [one for one in self._tried if self._may_win(one)]
        outlooks = self._outlooks(predictor, [one.candidate for one in good])
        close = close_ones(good, outlooks, room=self._budget)
        if len(close) < 2:
            return []
        finalists = []
        for one in close:
            config, plays = one.candidate.applied(self._config), outlooks[one.candidate].plays
            finalists.append(Finalist(self._models(config), config, one.costs, plays, one.trial))
        rounds = 1 + self._asked.repeats
        trials = take_turns(
            finalists,
            self._requests,
            tokenizer=self._tokenizer,
            rounds=rounds,
            progress=lambda turn: self._progress(
                "turns", turn, rounds * len(close), close[turn % len(close)].candidate.text()
            ),
        )
        again = []
        for one, finalist, trial in zip(close, finalists, trials, strict=True):
            predictor.learn(finalist.config, trial)
            costs = predictor.costs(finalist.config)
            score = self._score(finalist.config, trial)
            again.append(one.again(trial, costs=costs, score=score))
            self._tried[self._tried.index(one)] = again[-1]
        return again

    def _score(self, config: RunConfig, expected: Outlook | Trial) -> float:
        """What is made as small as possible: seconds, of a request or of all devices in use."""
        if self._asked.objective == "latency":
            return expected.whole
        return expected.seconds * self._paid(config)

    def _paid(self, config: RunConfig) -> int:
        """Devices whose seconds count."""
        return config.mesh.data * config.mesh.model if self._asked.objective == "cost" else 1

    def _promise(self, candidate: Candidate, outlook: Outlook) -> tuple[bool, float]:
        """Whether it is expected to miss the first token's bound, and its expected score."""
        late = bool(self._asked.max_ttft) and outlook.first_token > self._asked.max_ttft
        return late, self._score(candidate.applied(self._config), outlook)

    def _is_worth(self, candidate: Candidate, outlooks: Mapping[Candidate, Outlook]) -> bool:
        """Whether a coarser cache promises more than the config's own, where that fits."""
        own = field_of(self._config, "engine.kv_dtype")
        finer = candidate.changed({"engine.kv_dtype": own})
        if finer == candidate or finer not in outlooks:
            return True
        promised = [self._promise(each, outlooks[each])[1] for each in (candidate, finer)]
        return promised[0] < _PROMISE * promised[1]

    def _least(self) -> float:
        """The best score so far of what may win; infinite where nothing may."""
        return min((one.score for one in self._tried if self._may_win(one)), default=math.inf)

    def _may_win(self, one: Tried) -> bool:
        most = self._asked.max_ttft
        return one.fits and (not most or one.trial.first_token <= most)

    def _best(self, finalists: Sequence[Tried] = ()) -> Tried:
        """Of the finalists, whose times are comparable, or of all where none of them may win."""
        good = [one for one in finalists or self._tried if self._may_win(one)]
        good = good or [one for one in self._tried if self._may_win(one)]
        fitting = [one for one in self._tried if one.fits]
        if not fitting:
            raise ValueError(
                f"nothing that was tried fits into optimizer.memory={self._budget} bytes: raise "
                "it, optimizer.trials, or optimizer.max_kl"
            )
        if not good:
            nearest = min(fitting, key=lambda one: one.trial.first_token)
            raise ValueError(
                f"optimizer.max_ttft={self._asked.max_ttft:g} s isn't met by what was tried: the "
                f"nearest is {nearest.trial.first_token:.3g} s (95th percentile) with "
                f"{nearest.candidate.text()}; with optimizer.objective=latency nothing queues"
            )
        return min(good, key=lambda one: one.score)


def _precision(config: RunConfig) -> Precision:
    return config.compression.preset, config.engine.kv_dtype


def _device_memory() -> int:
    """Bytes that a candidate may need."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(DEVICE_SHARE * (limit or psutil.virtual_memory().total))
