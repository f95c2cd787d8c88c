"""LeptonOptimizer: the face of the optimizer for notebooks and scripts.

optimizer = LeptonOptimizer(objective="throughput", max_kl=0.02)
profile = optimizer.search(config, [[1, 338, 263], ...])
profile = optimizer.find(config, [[1, 338, 263], ...])  # in a later session
engine.load_model(config=profile.applied(config, given=())).start(profile=profile)
recovered = LeptonOptimizer(learning_rate=1e-3).recover("compressed/", "dense/", steps=200)
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lepton_jax import compile_cache
from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.config import (
    CalibrationSection,
    RecoverySection,
    RunConfig,
    SamplingParams,
    from_mapping,
)
from lepton_jax.optimizer import profile as profiles
from lepton_jax.optimizer.accuracy import Accuracy
from lepton_jax.optimizer.found import Found
from lepton_jax.optimizer.profile import Key, Profile
from lepton_jax.optimizer.recovery import recover_model
from lepton_jax.optimizer.sample import SampledRequest, require_rows, workload_class
from lepton_jax.optimizer.search import Search
from lepton_jax.optimizer.space import PRECISION, field_of
from lepton_jax.text import tokenizer as tokenizers

log = logging.getLogger(__name__)


class LeptonOptimizer:
    """Chooses an engine's parameters for a model, this machine and a workload, and recovers
    compressed models.

    Attributes:
      found: after `search`, all that was tried.
      training: after `recover`, what is told of it: steps, evaluations, text.
    """

    def __init__(
        self,
        *,
        objective: str = "throughput",
        max_kl: float = 0.0,
        max_ttft: float = 0.0,
        memory: int = 0,
        directory: str | Path = "",
        learning_rate: float = 1e-3,
    ):
        """What to reach.

        Args:
          objective: "throughput", "latency" or "cost".
          max_kl: most nats a token by which a compressed model may diverge; 0: no compression
            besides the config's.
          max_ttft: most seconds to a first token, 95th percentile; 0: no bound.
          memory: bytes of the device to use; 0: what it has.
          directory: of profiles; by default in the user's cache directory.
          learning_rate: of `recover`, relative to the root mean square of what it changes.
        """
        self._goal = dict(objective=objective, max_kl=max_kl, max_ttft=max_ttft, memory=memory)
        self._directory = Path(directory) if directory else profiles.default_directory()
        self._learning_rate = learning_rate
        self.found: Found | None = None
        self.training: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "LeptonOptimizer":
        """With the goals of a config."""
        section = config.optimizer
        return cls(
            objective=section.objective,
            max_kl=section.max_kl,
            max_ttft=section.max_ttft,
            memory=section.memory,
        )

    def search(
        self,
        engine_or_config,
        workload: Sequence,
        *,
        given: Collection[str] = (),
        progress: Callable[[str, int, int, str], None] = lambda *_: None,
    ) -> Profile:
        """Tries candidates on the workload and keeps the best as a profile.

        Args:
          engine_or_config: a `RunConfig`, or an engine that was loaded with one (`.config`).
          workload: a sample of the real requests: texts, lists of token ids, or `SampledRequest`s.
          given: fields ("engine.rows") that must stay as they are. Without `max_kl` compression and
            the cache's dtype are among them where the config sets them.
          progress: called with (stage, done, total, what).

        Raises ValueError where the goal can't be met, with the nearest that can.
        """
        task = self._task(engine_or_config, workload, given)
        compile_cache.enable()
        platform = jax.default_backend()  # where "auto" decides the dtype
        self.found = found = Search(
            task.config,
            task.requests,
            task.tokenizer,
            accuracy=Accuracy(
                task.tokenizer, self._directory, f"{task.key.model}-{task.key.dtype}-{platform}"
            ),
            given=task.given,
            progress=progress,
        ).run()
        best = found.best
        asked = task.given.intersection(PRECISION)  # of the runs that ask for it alone
        fields = {name: value for name, value in best.candidate.fields if name not in asked}
        profile = Profile(
            task.key, fields, best.costs, best.trial.knobs, _numbers(found), _tried(found)
        )
        profile.save(self.path_of(profile))
        return profile

    def find(
        self, engine_or_config, workload: Sequence, *, given: Collection[str] = ()
    ) -> Profile | None:
        """What an earlier `search` kept for this model, device, goal and kind of workload, or the
        profile that the config's optimizer.profile names; None where there is none, or it is "off".

        Arguments are those of `search`. Raises ValueError where the profile is damaged or of
        something else, OSError where a named one can't be read.
        """
        task = self._task(engine_or_config, workload, given)
        asked = task.config.optimizer.profile
        if asked == "off":
            return None
        profile, where = profiles.find(task.key, self._directory, asked)
        if profile is None:
            log.warning("profile: %s", where)
        return profile

    def _task(self, engine_or_config, workload: Sequence, given: Collection[str]) -> "_Task":
        config = getattr(engine_or_config, "config", engine_or_config)
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, **self._goal)
        )
        given = set(given) if config.optimizer.max_kl else {*given, *_set_precision(config)}
        path = config.model.path
        tokenizer = tokenizers.load(config.model.tokenizer or checkpoints.tokenizer_source(path))
        requests = [_request(item, tokenizer, config.sampling) for item in workload]
        require_rows(requests)
        kind = workload_class(requests)
        key = Key.here(checkpoints.identify(path), config, given=given, workload=kind)
        return _Task(config, given, tokenizer, requests, key)

    def recover(
        self,
        student: Any,
        teacher: Any,
        *,
        calibration: CalibrationSection | None = None,
        folder: str | Path | None = None,
        listen: Callable[[int, Mapping[str, float]], None] | None = None,
        **fields,
    ) -> checkpoints.Loaded:
        """Trains a compressed model to predict what the dense one does; it stays as small.

        Args:
          student: compressed: a path, what `checkpoints.load.load` gives, or an engine with it.
          teacher: the dense model, likewise.
          calibration: text and length of its windows; by default the text that ships.
          folder: where the training is kept; one that is there goes on.
          listen: called after each step with its number, "loss", "kl" and others.
          fields: of `config.RecoverySection`: train ("all" unless given), steps, minutes, ...

        Returns the recovered model, which `checkpoints.orbax_store.save` writes. Raises ValueError
        where the models don't belong together or nothing can be trained.
        """
        values = {"train": "all", "learning_rate": self._learning_rate} | fields
        found, self.training = recover_model(
            student,
            teacher,
            from_mapping(RecoverySection, values, where="recover"),
            calibration=calibration,
            folder=folder,
            listen=listen,
        )
        return found

    def path_of(self, profile: Profile) -> Path:
        """Where `search` put it."""
        return self._directory / profile.key.file_name


@dataclasses.dataclass(frozen=True)
class _Task:
    """A config with the optimizer's goals, fields that stay, and a workload."""

    config: RunConfig
    given: set[str]
    tokenizer: tokenizers.Tokenizer
    requests: Sequence[SampledRequest]
    key: Key


def _set_precision(config: RunConfig) -> list[str]:
    """Fields of the precision that a config sets."""
    usual = RunConfig()
    return [name for name in PRECISION if field_of(config, name) != field_of(usual, name)]


def _numbers(found: Found) -> dict[str, float]:
    before, after = found.tried[0].trial, found.best.trial
    programs, seconds = found.compiled
    numbers = dict(
        seconds_before=before.seconds,
        seconds=after.seconds,
        effect=found.effect,
        first_token=after.first_token,
        whole=after.whole,
        predicted=found.best.predicted,
        compile_seconds=seconds,
        programs=programs,
    )
    return numbers if found.kl is None else numbers | dict(kl=found.kl)


def _tried(found: Found) -> tuple[dict[str, Any], ...]:
    """Of each candidate what it was and what it took, in JSON types."""
    told = [
        dict(
            fields=dict(one.candidate.fields),
            predicted=one.predicted,
            seconds=one.trial.seconds,
            first_token=one.trial.first_token,
            whole=one.trial.whole,
            score=one.score,
        )
        for one in found.tried
    ]
    return tuple(json.loads(json.dumps(told)))


def _request(item, tokenizer, sampling: SamplingParams) -> SampledRequest:
    if isinstance(item, SampledRequest):
        return item
    ids = tokenizer.encode(item) if isinstance(item, str) else item
    return SampledRequest(tuple(ids), sampling)
