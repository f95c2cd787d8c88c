"""Runs a sample of requests on a real engine: seconds, latencies, lengths, what programs cost."""

import dataclasses
import gc
import time
from collections.abc import Sequence

import numpy as np

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import RunConfig
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scoring
from lepton_jax.optimizer.costs import UNIT, CostMeter, Costs
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.telemetry import BeatStats

LOOK_AHEAD = 4  # times the engine's rows: requests in the queue, as in a job


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a run of the sample took.

    Attributes:
      seconds: of the best run, without compiling.
      first_token, whole: seconds from a request's hand-over to its first and to its last token, in
        the 95th percentile.
      outputs: ids of each request.
      compile_seconds, programs: of the warm-up.
      beats: of all runs, for a `CostMeter`.
    """

    seconds: float
    first_token: float
    whole: float
    outputs: tuple[tuple[int, ...], ...]
    compile_seconds: float
    programs: int
    beats: tuple[BeatStats, ...]

    @property
    def lengths(self) -> list[int]:
        """Outputs of each request."""
        return list(map(len, self.outputs))

    def meter(self) -> CostMeter:
        """A meter that has heard its beats."""
        meter = CostMeter()
        for beat in self.beats:
            meter.take(beat)
        return meter


class _Tape:
    """Keeps beats."""

    def __init__(self):
        self.beats: list[BeatStats] = []

    def take(self, beat: BeatStats) -> None:
        self.beats.append(beat)

    def forget(self) -> None:
        """What was measured stays."""


def try_out(
    loaded: Loaded,
    config: RunConfig,
    requests: Sequence[SampledRequest],
    *,
    eos_ids: Sequence[int],
    repeats: int = 1,
    costs: Costs = UNIT,
) -> Trial:
    """Serves all requests `repeats` times on an engine of this config; the best run counts.

    `costs` are those that feedback reckons with, as a run with a profile does.
    """
    work = [request.work for request in requests]
    engine = Engine(
        loaded.model, loaded.leaves, section=config.engine, eos_ids=eos_ids, workload=work
    )
    try:
        engine.warm_up(work, wait=True)
        section, tape = config.optimizer, _Tape()
        engine.listen(tape)
        if section.feedback != "off":
            timed = section.feedback == "on"
            Feedback(engine, timed=timed, costs=costs, objective=section.objective)
        runs = []
        for number in range(repeats):
            engine.forget()
            runs.append(_serve(engine, requests, config, prefix=f"{number}/"))
        stats = engine.stats()
    finally:
        engine.close()
        gc.collect()  # programs hold the engine's memory in cycles
    best = min(runs, key=lambda run: run.seconds)
    return Trial(
        seconds=best.seconds,
        first_token=float(np.percentile(best.first, 95)),
        whole=float(np.percentile(best.whole, 95)),
        outputs=tuple(map(tuple, best.outputs)),
        compile_seconds=stats["compile_seconds"],
        programs=stats["programs"],
        beats=tuple(tape.beats),
    )


@dataclasses.dataclass
class _Run:
    seconds: float
    first: list[float]
    whole: list[float]
    outputs: list[list[int]]


def _serve(
    engine: Engine, requests: Sequence[SampledRequest], config: RunConfig, *, prefix: str
) -> _Run:
    """One run, fed as a job feeds, or with no queue where latency is what counts."""
    waits = config.optimizer.objective == "latency"
    most = config.engine.rows * (1 if waits else LOOK_AHEAD)
    started = time.perf_counter()
    added: list[float] = []
    zeros = [0.0] * len(requests)
    run = _Run(0.0, zeros, list(zeros), [[] for _ in requests])
    open_count = 0

    def take(output: StepOutput) -> int:
        place, now = int(output.request_id.rpartition("/")[2]), time.perf_counter()
        if not run.first[place]:
            run.first[place] = now - added[place]
        run.outputs[place] += output.token_ids
        if output.finish_reason:
            run.whole[place] = now - added[place]
        return output.finish_reason is not None

    while len(added) < len(requests) or open_count:
        while len(added) < len(requests) and open_count < most:
            _add(engine, f"{prefix}{len(added)}", requests[len(added)])
            added.append(time.perf_counter())
            open_count += 1
        open_count -= sum(map(take, engine.step()))
    run.seconds = time.perf_counter() - started
    return run


def _add(engine: Engine, name: str, request: SampledRequest) -> None:
    if isinstance(request.asked, Scoring):
        engine.add_scoring(name, request.prompt_ids, request.asked)
    else:
        engine.add_request(name, request.prompt_ids, request.asked, guide=request.guide)
