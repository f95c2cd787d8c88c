"""Runs a sample of requests on real engines: seconds, latencies, lengths, what programs cost."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import RunConfig
from lepton_jax.distributed.local import local_engines, local_pool
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.packing import DecodeShape
from lepton_jax.engine.protocol import TokenEngine
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scoring
from lepton_jax.optimizer.costs import UNIT, Costs, settled
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.play import Play, Tape
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.telemetry import BeatStats
from lepton_jax.text.tokenizer import Tokenizer

_LOOK_AHEAD = 4  # times the engine's rows: queued requests, so that freed slots are filled at once
# Times the best seconds so far: a first run that takes longer is the only one. It is cold: 48 short
# requests took 2.8 s at first and 1.6 then (SmolLM2, two AVX-512 cores).
_HOPELESS = 1.5


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a run of the sample took.

    Attributes:
      seconds: of the quickest run, without compiling.
      first_token, whole: seconds from a request's hand-over to its first and to its last token, in
        the 95th percentile.
      outputs: ids of each request.
      compile_seconds, programs: of the warm-up.
      beats: of all runs, for a `CostMeter`.
      knobs: that the best run began with: after the first run those that it ended with.
    """

    seconds: float
    first_token: float
    whole: float
    outputs: tuple[tuple[int, ...], ...]
    compile_seconds: float
    programs: int
    beats: tuple[BeatStats, ...]
    knobs: Mapping[str, float]

    @property
    def lengths(self) -> list[int]:
        """Outputs of each request."""
        return list(map(len, self.outputs))


@dataclasses.dataclass(frozen=True)
class Models:
    """Weights of a trial: the model's, and a draft model's where one proposes."""

    model: Loaded
    draft: Loaded | None = None


def look_ahead(config: RunConfig) -> int:
    """Requests that a replica has at once, in a trial and in a job: with no queue where latency is
    what counts.
    """
    waits = config.optimizer.objective == "latency"
    return config.engine.rows * (1 if waits else _LOOK_AHEAD)


def try_out(
    models: Models,
    config: RunConfig,
    requests: Sequence[SampledRequest],
    *,
    tokenizer: Tokenizer,
    plays: Sequence[Play] = (),
    costs: Costs = UNIT,
    best: float = float("inf"),
    progress: Callable[[int], None] = lambda run: None,
) -> Trial:
    """Serves all requests `optimizer.repeats` times on engines of this config; the best run counts.

    Args:
      plays, costs: as `Stand` takes them.
      best: seconds that another config took: what is far from it is not repeated.
      progress: called before each run with its number.
    """
    with Stand(models, config, requests, tokenizer=tokenizer, plays=plays, costs=costs) as stand:
        runs, tape = [], stand.listen()
        while len(runs) < config.optimizer.repeats:
            progress(len(runs))
            runs.append(stand.run())
            if runs[0].seconds > _HOPELESS * best:
                break
            stand.begin(stand.learned)
        return stand.trial(runs, tape)


@dataclasses.dataclass
class Run:
    """One time through the sample: seconds, and of each request seconds to its first and to its
    last token, and its outputs; `knobs` are what feedback began with.
    """

    seconds: float
    first: list[float]
    whole: list[float]
    outputs: list[list[int]]
    knobs: Mapping[str, float]


class Stand:
    """Engines of a config that serve a sample as often as they are asked.

    Attributes:
      engines: one for each replica.
    """

    def __init__(
        self,
        models: Models,
        config: RunConfig,
        requests: Sequence[SampledRequest],
        *,
        tokenizer: Tokenizer,
        plays: Sequence[Play] = (),
        costs: Costs = UNIT,
    ):
        """Compiles.

        Args:
          plays: what the engines are expected to do: only programs that they reach are compiled.
          costs: that feedback reckons with, as a run with a profile does.
        """
        self._requests = requests
        self._most = config.mesh.data * look_ahead(config)
        self.engines = local_engines(
            models.model,
            settled(config, costs),
            mesh=config.mesh,
            tokenizer=tokenizer,
            draft=models.draft,
            workload=[request.work for request in requests],
        )
        several = len(self.engines) > 1
        self._served = local_pool(self.engines, config) if several else self.engines[0]
        self._knobs: Mapping[str, float] = {}
        for engine in self.engines:
            _warm_up(engine, requests, plays)
        section = config.optimizer
        options = dict(timed=section.feedback == "on", objective=section.objective, costs=costs)
        listening = self.engines if section.feedback != "off" else []
        self._feedbacks = [Feedback(engine, **options) for engine in listening]

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the engines' memory back."""
        self._served.close()

    def listen(self) -> Tape:
        """What keeps all beats from now on."""
        tape = Tape()
        for engine in self.engines:
            engine.listen(tape)
        return tape

    @property
    def learned(self) -> Mapping[str, float]:
        """Knobs as the first engine's feedback has them now."""
        return self._feedbacks[0].learned if self._feedbacks else {}

    def begin(self, knobs: Mapping[str, float]) -> None:
        """Runs begin with these knobs from now on."""
        self._knobs = knobs
        for feedback in self._feedbacks:
            feedback.begin(knobs)

    def run(self) -> Run:
        """Serves the sample; once more where it had to wait for a program."""
        late = -1
        while self._late() > late:
            late = self._late()
            self._served.forget()
            run = self._serve()
        return run

    def trial(self, runs: Sequence[Run], tape: Tape) -> Trial:
        """What the quickest of these runs took; the tape has heard all of them."""
        quickest = min(runs, key=lambda run: run.seconds)
        stats = [engine.stats() for engine in self.engines]
        return Trial(
            seconds=quickest.seconds,
            first_token=float(np.percentile(quickest.first, 95)),
            whole=float(np.percentile(quickest.whole, 95)),
            outputs=tuple(map(tuple, quickest.outputs)),
            compile_seconds=max(each["compile_seconds"] for each in stats),
            programs=sum(each["programs"] for each in stats),
            beats=tuple(tape.beats),
            knobs=quickest.knobs,
        )

    def _late(self) -> int:
        """Programs that were compiled while the engines ran."""
        return sum(engine.stats()["late_compiles"] for engine in self.engines)

    def _serve(self) -> Run:
        engine, requests = self._served, self._requests
        started, added, open_count = time.perf_counter(), [], 0
        zeros = [0.0] * len(requests)
        run = Run(0.0, zeros, list(zeros), [[] for _ in requests], self._knobs)

        def take(output: StepOutput) -> int:
            place, now = int(output.request_id), time.perf_counter()
            if not run.first[place]:
                run.first[place] = now - added[place]
            run.outputs[place] += output.token_ids
            if output.finish_reason:
                run.whole[place] = now - added[place]
            return output.finish_reason is not None

        while len(added) < len(requests) or open_count:
            while len(added) < len(requests) and open_count < self._most:
                _add(engine, str(len(added)), requests[len(added)])
                added.append(time.perf_counter())
                open_count += 1
            open_count -= sum(map(take, engine.step()))
        run.seconds = time.perf_counter() - started
        return run


def _warm_up(engine: Engine, requests: Sequence[SampledRequest], plays: Sequence[Play]) -> None:
    """Compiles what the plays reach, or all that the requests can where nothing was played."""
    reached = [play.reached() for play in plays]
    prefills = {places for found, _ in reached for places in found}
    decodes = {shape for _, found in reached for shape in found}
    rows = {rows for rows, _ in decodes}

    def needed(shape: Any) -> bool:
        if not isinstance(shape, DecodeShape):
            return shape.tokens in prefills
        seen = (shape.rows, shape.view) in decodes if shape.view else shape.rows in rows
        return seen or shape.draft > 0

    work = [request.work for request in requests]
    engine.warm_up(work, wait=True, only=needed if plays else None)


def _add(engine: TokenEngine, name: str, request: SampledRequest) -> None:
    if isinstance(request.asked, Scoring):
        engine.add_scoring(name, request.prompt_ids, request.asked)
    else:
        engine.add_request(name, request.prompt_ids, request.asked)
