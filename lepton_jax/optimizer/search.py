"""The search before a job: candidates are dropped by memory and accuracy and ordered by predicted
time, and the best few are run on a sample of the real rows on the real device.

The config as it is comes first: it gives T0 and the costs that predictions begin with. Each trial
corrects them for the next choice. Read next: `space.py`, `predict.py`, `trial.py`.
"""

import dataclasses
import gc
from collections.abc import Callable, Collection, Sequence

import jax
import psutil

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.load import load_compressed
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import RunConfig
from lepton_jax.engine.sizing import DEVICE_SHARE
from lepton_jax.optimizer.accuracy import Accuracy
from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.predict import Outlook, Predictor
from lepton_jax.optimizer.sample import (
    SampledRequest,
    repeated_share,
    require_rows,
    shares_beginnings,
)
from lepton_jax.optimizer.space import DIMENSIONS, PRESETS, SHARING, Candidate, field_of, space
from lepton_jax.optimizer.trial import Trial, try_out
from lepton_jax.sharding import devices_for
from lepton_jax.tensors import CompressedTensor
from lepton_jax.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int, str], None]

_MARGIN = 1.15  # a candidate that is predicted to be so much slower than the best isn't tried
_LOOKED_AT = 12  # of the most promising, predicted again after each trial
_REPEATED = 0.4  # share of foreseen outputs from which speculation is tried


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was run. `predicted` seconds are those from just before its trial."""

    candidate: Candidate
    predicted: float
    trial: Trial
    costs: Costs

    @property
    def error(self) -> float:
        """Of the prediction, in shares of what was measured."""
        return self.predicted / self.trial.seconds - 1


@dataclasses.dataclass(frozen=True)
class Found:
    """A search's result.

    Attributes:
      best: the winner.
      tried: all trials in their order; the first is the config as it was.
      considered: candidates in the space; `too_large` of them don't fit into memory, and
        `too_coarse` presets diverge more than allowed, with their KL.
      kl: of the winner's preset; None where nothing was measured.
    """

    best: Tried
    tried: tuple[Tried, ...]
    considered: int
    too_large: int
    too_coarse: dict[str, float]
    kl: float | None

    @property
    def effect(self) -> float:
        """T1/T0 as a gain: the time before over the time after."""
        return self.tried[0].trial.seconds / self.best.trial.seconds


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
        progress: Progress = lambda stage, done, total, what: None,
    ):
        """Raises ValueError where the sample is empty."""
        require_rows(requests)
        self._config, self._requests, self._tokenizer = config, requests, tokenizer
        self._given, self._accuracy, self._progress = frozenset(given), accuracy, progress
        self._asked = config.optimizer
        self._loaded: tuple[str, Loaded] | None = None

    def run(self) -> Found:
        """Raises ValueError where no candidate keeps what was asked, naming the nearest."""
        config, loaded = self._config, self._load(self._config.compression.preset)
        predictor = Predictor(loaded.model, self._requests)
        presets, coarse = self._presets(loaded)
        shared = shares_beginnings(self._requests)
        candidates = space(
            config,
            given=self._given,
            presets=presets,
            requests=len(self._requests),
            dimensions=DIMENSIONS | (SHARING if shared else {}),
        )
        own = candidates[0]
        tried = [self._try(own, predictor.outlook(config), predictor)]
        outlooks = self._outlooks(predictor, candidates)
        fitting = self._fitting(outlooks)
        left = [candidate for candidate in fitting if candidate != own]
        while left and len(tried) < self._asked.trials:
            left = sorted(left, key=lambda c: outlooks[c].seconds)
            outlooks |= self._outlooks(predictor, left[:_LOOKED_AT])
            following = min(left[:_LOOKED_AT], key=lambda c: outlooks[c].seconds)
            best = min(tried, key=self._score)
            if outlooks[following].seconds > _MARGIN * best.trial.seconds:
                break
            left.remove(following)
            tried.append(self._try(following, outlooks[following], predictor))
        tried += self._speculating(tried, predictor)
        best = self._best(tried)
        preset = best.candidate.applied(config).compression.preset
        measured = not self._accuracy.missing([preset])
        return Found(
            best,
            tuple(tried),
            considered=len(candidates),
            too_large=len(candidates) - len(fitting),
            too_coarse=coarse,
            kl=self._accuracy.kl(preset) if measured else None,
        )

    def _speculating(self, tried: Sequence[Tried], predictor: Predictor) -> list[Tried]:
        """The best so far with lookup, where answers repeat themselves or their prompts."""
        name = "engine.speculation"
        if name in self._given or field_of(self._config, name) != "off":
            return []
        best = min(tried, key=self._score)
        share = repeated_share(self._requests, best.trial.outputs)
        if share < _REPEATED:
            return []
        candidate = Candidate.of(dict(best.candidate.fields) | {name: "lookup"})
        outlook = Outlook(best.trial.seconds / (1 + share), 0)
        return [self._try(candidate, outlook, predictor)]

    def _outlooks(
        self, predictor: Predictor, candidates: Sequence[Candidate]
    ) -> dict[Candidate, Outlook]:
        found = {}
        for done, candidate in enumerate(candidates):
            self._progress("predict", done, len(candidates), candidate.text())
            found[candidate] = predictor.outlook(candidate.applied(self._config))
        return found

    def _fitting(self, outlooks: dict[Candidate, Outlook]) -> list[Candidate]:
        budget = self._asked.memory or _device_memory()
        fitting = [c for c, outlook in outlooks.items() if outlook.memory <= budget]
        if not fitting:
            candidate = min(outlooks, key=lambda c: outlooks[c].memory)
            least = outlooks[candidate].memory
            raise ValueError(
                f"nothing fits into optimizer.memory={budget} bytes: the smallest candidate, "
                f"{candidate.text()}, needs {least}"
            )
        return fitting

    def _presets(self, loaded: Loaded) -> tuple[list[str], dict[str, float]]:
        """Presets that keep optimizer.max_kl, and the KL of those that don't."""
        compressed = any(isinstance(leaf, CompressedTensor) for leaf in loaded.leaves)
        fixed = {"compression.preset", "compression.rules"} & self._given
        own = self._config.compression.preset
        if not self._asked.max_kl or fixed or (compressed and own == "none"):
            return [], {}
        presets = [preset for preset in PRESETS if preset != own]
        if self._accuracy.missing([own, *presets]):
            self._measure_presets([own, *presets])
        kls = {preset: self._accuracy.kl(preset) for preset in [own, *presets]}
        if kls[own] > self._asked.max_kl:
            raise ValueError(
                f"compression.preset={own!r} diverges by {kls[own]:.4f} nats a token, more than "
                f"optimizer.max_kl={self._asked.max_kl:g}: raise it, or give another preset"
            )
        kept = [preset for preset in presets if kls[preset] <= self._asked.max_kl]
        return ["none", *kept], {p: kls[p] for p in presets if p not in kept}

    def _measure_presets(self, presets: Sequence[str]) -> None:
        self._accuracy.begin(self._load("none"))
        missing = self._accuracy.missing(presets)
        for done, preset in enumerate(missing):
            self._progress("accuracy", done, len(missing), preset)
            self._accuracy.measure(preset, self._load(preset))

    def _try(self, candidate: Candidate, outlook: Outlook, predictor: Predictor) -> Tried:
        config = candidate.applied(self._config)
        self._progress("try", 0, 1, candidate.text())
        loaded = self._load(config.compression.preset)
        costs = predictor.costs(config)
        trial = try_out(
            loaded,
            config,
            self._requests,
            eos_ids=self._tokenizer.eos_ids,
            repeats=self._asked.repeats,
            costs=costs,
        )
        costs = trial.meter().costs(costs)
        predictor.learn(config, costs, trial.lengths)
        return Tried(candidate, outlook.seconds, trial, costs)

    def _score(self, tried: Tried) -> float:
        """What is made as small as possible."""
        return tried.trial.whole if self._asked.objective == "latency" else tried.trial.seconds

    def _best(self, tried: Sequence[Tried]) -> Tried:
        most = self._asked.max_ttft
        good = [one for one in tried if not most or one.trial.first_token <= most]
        if not good:
            nearest = min(tried, key=lambda one: one.trial.first_token)
            raise ValueError(
                f"optimizer.max_ttft={most:g} s isn't met by what was tried: the nearest is "
                f"{nearest.trial.first_token:.3g} s (95th percentile) with "
                f"{nearest.candidate.text()}; with optimizer.objective=latency nothing queues"
            )
        return min(good, key=self._score)

    def _load(self, preset: str) -> Loaded:
        """The model with a preset, or with the config's rules; one at a time is kept."""
        if self._loaded and self._loaded[0] == preset:
            return self._loaded[1]
        self._loaded = None
        gc.collect()
        model, section = self._config.model, self._config.compression
        same = preset == section.preset
        recipe = Recipe.from_config(section) if same else Recipe.of(preset=preset)

        def progress(done: int, total: int, path: str) -> None:
            self._progress(f"load {preset}", done, total, path)

        devices = devices_for(self._config.mesh.model)
        loaded = load_compressed(model, recipe, progress=progress, devices=devices)
        self._loaded = preset, loaded
        return loaded


def _device_memory() -> int:
    """Bytes that a candidate may need."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(DEVICE_SHARE * (limit or psutil.virtual_memory().total))
