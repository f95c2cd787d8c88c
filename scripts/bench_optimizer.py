"""What feedback gains on SmolLM2 in w8a8: five workloads and one that shifts, beside static knobs.

    python scripts/bench_optimizer.py [--repeats=5] [--workloads=short,long] [--simulate]

All contenders run on one engine, compiled once for 32 rows and blocks of 32 steps, and take turns:
the default knobs (blocks of 8), hand-picked ones that stay, and feedback: deterministic, with costs
measured before as a profile keeps them, and by the clock. Prints the median seconds of each, the
best of the hand-picked, and gains. --simulate: one real run of each workload gives costs and
lengths, and the contenders run on the simulated engine: for machines that others use meanwhile.
What a search chooses beyond knobs: `python -m lepton_jax.tune`.
"""

import argparse
import random
import statistics
import time

from lepton_jax import LeptonEngine, SamplingParams
from lepton_jax.config import EngineSection, OptimizerSection, RunConfig
from lepton_jax.optimizer.costs import UNIT, CostMeter, Costs
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.simulated_engine import SimulatedEngine, SimulatedRow, SimulatedSizes

ROWS, BLOCK, LOOK_AHEAD = 32, 32, 4
ENGINE = EngineSection(rows=ROWS, page_size=16, num_pages=1600, decode_block=BLOCK, max_len=512)
DEFAULT = dict(decode_block=8)
STATIC = {
    "block 2": dict(decode_block=2),
    "block 8": DEFAULT,
    "block 32": dict(decode_block=32),
    "block 4, 8 together": dict(decode_block=4, admit_together=8),
    "block 8, longest first": dict(decode_block=8, longest_first=True),
}
THINGS = "apple river hammer carrot cloud piano salmon brick lemon tiger window bread".split()


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def workloads() -> dict[str, list]:
    """Name to (prompt, params)."""
    draw = random.Random(0)
    words = [draw.choice(THINGS) for _ in range(400)]
    rules = "You sort things for a shop. " + " ".join(
        f"Rule {n}: things like {a} go beside things like {b}."
        for n, (a, b) in enumerate(zip(words[:20], words[20:40], strict=True))
    )
    stops, fixed = dict(max_tokens=48), dict(ignore_eos=True)
    made = {
        "short": [
            (chat(f"Is {w} {n} a fruit? Answer with yes or no."), SamplingParams(**stops))
            for n, w in enumerate(words[:128])
        ],
        "long": [(f"A story of {w}:", SamplingParams(max_tokens=128, **fixed)) for w in words[:32]],
        "tail": [
            (
                f"About {w}:",
                SamplingParams(max_tokens=min(256, int(8 * draw.paretovariate(0.8))), **fixed),
            )
            for w in words[:96]
        ],
        "shared": [
            (f"{rules}\nWhere does {w} {n} go?", SamplingParams(max_tokens=12, **fixed))
            for n, w in enumerate(words[:64])
        ],
        "extract": [
            (chat(f"Copy this list: {', '.join(words[n : n + 12])}"), SamplingParams(**stops))
            for n in range(64)
        ],
    }
    made["shift"] = made["short"] + made["long"]
    return made


class Bench:
    """One engine and its contenders."""

    def __init__(self):
        config = RunConfig(engine=ENGINE, optimizer=OptimizerSection(feedback="off"))
        self.lepton = LeptonEngine().load_model("demo:smollm2", compression="w8a8", config=config)
        tokenizer = self.lepton.tokenizer
        self.work = {
            name: [
                (tokenizer.encode(p) if isinstance(p, str) else tokenizer.apply_chat(p), params)
                for p, params in rows
            ]
            for name, rows in workloads().items()
        }
        everything = [(len(ids), params) for rows in self.work.values() for ids, params in rows]
        self.engine = self.lepton.start(workload=everything).engine
        self.engine.warm_up(everything)
        self._plain = self.engine.scheduler.knobs
        self._beats, self._runs = self.engine._beats, 0
        self.lengths: dict[str, list[int]] = {}  # of the last run of each workload

    def run(self, name: str, *, knobs: dict | None = None, listener=None) -> float:
        """Seconds of a workload with knobs that stay, or with a listener that turns them."""
        engine, rows = self.engine, self.work[name]
        self._beats.listeners[:] = []
        engine.forget()
        engine.scheduler.turn(**vars(self._plain))
        engine.scheduler.turn(**(DEFAULT if knobs is None else knobs))
        if listener:
            listener(engine)
        self._runs += 1
        started, added, left = time.perf_counter(), 0, 0
        self.lengths[name] = lengths = [0] * len(rows)
        while added < len(rows) or left:
            while added < len(rows) and left < LOOK_AHEAD * ROWS:
                engine.add_request(f"{self._runs}-{added}", *rows[added])
                added, left = added + 1, left + 1
            for output in engine.step():
                lengths[int(output.request_id.partition("-")[2])] += len(output.token_ids)
                left -= output.finish_reason is not None
        return time.perf_counter() - started

    def simulate(
        self, name: str, costs: Costs, *, knobs: dict | None = None, listener=None
    ) -> float:
        """The same on the simulated engine, with the lengths of the last real run."""
        sizes = SimulatedSizes(
            rows=ROWS,
            page_size=ENGINE.page_size,
            num_pages=ENGINE.num_pages,
            prefill_chunk=ENGINE.prefill_chunk,
            decode_block=BLOCK,
            max_len=ENGINE.max_len,
            queue=LOOK_AHEAD * ROWS,
        )
        engine = SimulatedEngine(sizes, costs)
        engine.scheduler.turn(**(DEFAULT if knobs is None else knobs))
        if listener:
            listener(engine)
        return engine.run(
            [
                SimulatedRow(tuple(ids), params.max_tokens, length)
                for (ids, params), length in zip(self.work[name], self.lengths[name], strict=True)
            ]
        )


class _Meter(CostMeter):
    """A listener that only measures."""

    def forget(self) -> None:
        """What was measured stays."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", default="")
    parser.add_argument("--simulate", action="store_true")
    asked = parser.parse_args()
    bench, meter = Bench(), _Meter()
    names = asked.workloads.split(",") if asked.workloads else list(bench.work)
    for name in names:  # a run that isn't counted gives the costs that a profile would keep
        bench.run(name, listener=lambda engine: engine.listen(meter))
    costs = meter.costs(UNIT)
    print(f"costs: {costs}", flush=True)
    contenders = {label: dict(knobs=knobs) for label, knobs in STATIC.items()}
    for label, options in {
        "deterministic": dict(timed=False),
        "with costs": dict(timed=False, costs=costs),
        "by the clock": dict(timed=True, costs=costs),
    }.items():
        contenders[label] = dict(listener=lambda engine, o=options: Feedback(engine, **o))
    for name in names:
        times = {label: [] for label in contenders}
        for _ in range(1 if asked.simulate else asked.repeats):
            for label, options in contenders.items():
                if asked.simulate:
                    times[label].append(bench.simulate(name, costs, **options))
                else:
                    times[label].append(bench.run(name, **options))
        medians = {label: statistics.median(runs) for label, runs in times.items()}
        best = min(STATIC, key=medians.get)
        print(f"\n{name}: best of those that stay: {best}")
        for label, seconds in medians.items():
            spread = (max(times[label]) - min(times[label])) / seconds
            print(
                f"  {label:<24}{seconds:8.2f} s  spread {spread:4.0%}"
                f"  default {medians['block 8'] / seconds - 1:+5.0%}"
                f"  best {medians[best] / seconds - 1:+5.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
