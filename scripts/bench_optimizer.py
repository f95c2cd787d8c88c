"""What the optimizer gains on SmolLM2: workloads, each served by hand-picked configs and by what
search and feedback make of the defaults.

    python scripts/bench_optimizer.py [--repeats=5] [--workloads=short,long,tail,shared,extract]
    python scripts/bench_optimizer.py --workloads=shift
    python scripts/bench_optimizer.py --exhaustive=shared
    python scripts/bench_optimizer.py --simulate

All contenders' engines are compiled first and then take turns; those that are picked by hand have
no feedback. Prints the median seconds of each and what it gains on the defaults and on the best of
the hand-picked. "shift" is a workload that changes halfway, from free text to copying; in it the
search only chooses the knobs' beginnings. --exhaustive measures every candidate of a small space,
beside what was predicted of it after the first two trials, and says how far a search of four trials
is from the best. --simulate runs each workload once, for the costs of programs and the lengths of
answers, and everything else on simulated engines: for machines that do other things meanwhile.
"""

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lepton_jax import SamplingParams, compile_cache
from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import ModelSection, OptimizerSection, RunConfig
from lepton_jax.engine.knobs import longest_draft
from lepton_jax.optimizer.accuracy import Accuracy
from lepton_jax.optimizer.found import Found
from lepton_jax.optimizer.predict import Predictor
from lepton_jax.optimizer.sample import SampledRequest, shares_beginnings
from lepton_jax.optimizer.search import Search
from lepton_jax.optimizer.shelf import Shelf
from lepton_jax.optimizer.space import axes, space, with_fields
from lepton_jax.optimizer.trial import Models, Stand, try_out
from lepton_jax.text import tokenizer as tokenizers

MAX_KL = 0.03
DEFAULTS = RunConfig(
    model=ModelSection(path="demo:smollm2"), optimizer=OptimizerSection(feedback="off")
)
W8A8 = {"compression.preset": "w8a8"}
STATIC = {
    "w8a8": W8A8,
    "w8a8, blocks of 2": W8A8 | {"engine.decode_block": 2},
    "w8a8, blocks of 32": W8A8 | {"engine.decode_block": 32},
    "w8a8, 64 rows": W8A8 | {"engine.rows": 64},
    "w8a8, pages of 16": W8A8 | {"engine.page_size": 16},
}
FEW = W8A8 | {"engine.rows": 4}
SHIFT_STATIC = {
    "4 rows": FEW,
    "4 rows, blocks of 32": FEW | {"engine.decode_block": 32},
    "4 rows, drafts of 3": FEW | {"engine.speculation": "lookup", "engine.draft_tokens": 3},
    "4 rows, drafts of 7": FEW | {"engine.speculation": "lookup"},
    "8 rows": FEW | {"engine.rows": 8},
}
SMALL = {
    ("engine.rows",): [(8,), (32,)],
    ("engine.decode_block",): [(4,), (16,)],
    ("engine.page_size",): [(16,), (64,)],
}
THINGS = "apple river hammer carrot cloud piano salmon brick lemon tiger window bread".split()


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def table(number: int) -> str:
    lines = [f"| {n + number} | {w} | {3 * n + number}.50 |" for n, w in enumerate(THINGS)]
    return "\n".join(["| id | thing | price |", *lines])


def workloads() -> dict[str, list]:
    """Name to (prompt, params)."""
    draw = random.Random(0)
    words = [draw.choice(THINGS) for _ in range(400)]
    rules = "You sort things for a shop. " + " ".join(
        f"Rule {n}: things like {a} go beside things like {b}."
        for n, (a, b) in enumerate(zip(words[:20], words[20:40], strict=True))
    )
    stops, fixed = dict(max_tokens=48), dict(ignore_eos=True)
    short = [
        (chat(f"Is {w} {n} a fruit? Answer with yes or no."), SamplingParams(**stops))
        for n, w in enumerate(words[:96])
    ]
    long = SamplingParams(max_tokens=96, **fixed)
    tail = [min(192, int(8 * draw.paretovariate(0.8))) for _ in range(64)]
    free = SamplingParams(max_tokens=96, temperature=0.9, seed=1, **fixed)
    copied = SamplingParams(max_tokens=96, **fixed)
    copy = "Here is a table:\n{0}\n\nThe same table once more, without any change:\n{1}\n"
    return {
        "short": short,
        "long": [(f"A story of {w}:", long) for w in words[:32]],
        "tail": [
            (f"About {w}:", SamplingParams(max_tokens=most, **fixed))
            for w, most in zip(words, tail, strict=False)
        ],
        "shared": [
            (f"{rules}\nWhere does {w} {n} go?", SamplingParams(max_tokens=12, **fixed))
            for n, w in enumerate(words[:48])
        ],
        "extract": [
            (chat(f"Copy this list: {', '.join(words[n : n + 12])}"), SamplingParams(**stops))
            for n in range(64)
        ],
        "shift": [
            *((f"A story of {w}. Once upon a time", free) for w in words[:8]),
            *((copy.format(table(n), table(n)[:22]), copied) for n in range(8)),
        ],
    }


class Bench:
    """Models and requests of all contenders."""

    def __init__(self):
        compile_cache.enable()
        path = DEFAULTS.model.path
        self.tokenizer = tokenizers.load(checkpoints.tokenizer_source(path))
        self._accuracy = Accuracy(
            self.tokenizer, Path(tempfile.gettempdir()), checkpoints.identify(path)
        )
        self._shelf = Shelf(2 << 30, lambda *_: None)

    def requests(self, name: str) -> list[SampledRequest]:
        encode, chat = self.tokenizer.encode, self.tokenizer.apply_chat
        return [
            SampledRequest(tuple(encode(p) if isinstance(p, str) else chat(p)), params)
            for p, params in workloads()[name]
        ]

    def model(self, config: RunConfig) -> Loaded:
        return self._shelf.model(config)

    def search(self, requests: Sequence[SampledRequest], config: RunConfig, **options) -> Found:
        accuracy = self._accuracy
        search = Search(config, requests, self.tokenizer, accuracy=accuracy, **options)
        return search.run()

    def stand(self, config: RunConfig, requests: Sequence[SampledRequest], **options) -> Stand:
        """Engines of a config, warm."""
        models = Models(self.model(config))
        stand = Stand(models, config, requests, tokenizer=self.tokenizer, **options)
        stand.run()
        return stand


def contest(bench: Bench, name: str, repeats: int) -> None:
    """A workload's table."""
    requests, shifts = bench.requests(name), name == "shift"
    asked = OptimizerSection(max_kl=MAX_KL, sample=len(requests), trials=4, repeats=2)
    ours = dataclasses.replace(DEFAULTS, optimizer=asked)
    given: tuple[str, ...] = ()
    if shifts:
        ours = with_fields(ours, SHIFT_STATIC["4 rows, drafts of 7"])
        given = tuple(SHIFT_STATIC["4 rows, drafts of 7"])
    began = time.perf_counter()
    found = bench.search(requests, ours, given=given)
    best = found.best
    print(f"\n{name}: searched {time.perf_counter() - began:.0f} s: {best.candidate.text()}")
    print(f"  begins with {dict(best.trial.knobs)}; tried:")
    for one in found.tried:
        print(
            f"  predicted {one.predicted:6.2f} s, measured {one.trial.seconds:6.2f} s: "
            f"{one.candidate.text()}",
            flush=True,
        )
    picked = SHIFT_STATIC if shifts else STATIC
    stands = {"defaults": bench.stand(DEFAULTS, requests)}
    for label, fields in picked.items():
        stand = stands[label] = bench.stand(with_fields(DEFAULTS, fields), requests)
        if "engine.speculation" in fields:
            for engine in stand.engines:
                engine.scheduler.draft_policy = longest_draft
            stand.run()
    mine = stands["search and feedback"] = bench.stand(
        best.candidate.applied(ours), requests, costs=best.costs
    )
    mine.begin(best.trial.knobs)
    times: dict[str, list[float]] = {label: [] for label in stands}
    for _ in range(repeats):
        for label, stand in stands.items():
            times[label].append(stand.run().seconds)
    for stand in stands.values():
        stand.close()
    show(times, picked)


def show(times: Mapping[str, Sequence[float]], picked: Mapping[str, dict]) -> None:
    medians = {label: statistics.median(runs) for label, runs in times.items()}
    best = min(picked, key=medians.get)
    print(f"  best of the hand-picked: {best}")
    for label, seconds in medians.items():
        spread = (max(times[label]) - min(times[label])) / seconds
        print(
            f"  {label:<24}{seconds:7.2f} s  spread {spread:4.0%}"
            f"  on the defaults {medians['defaults'] / seconds - 1:+5.0%}"
            f"  on the best {medians[best] / seconds - 1:+5.0%}",
            flush=True,
        )


def simulate(bench: Bench, name: str) -> None:
    """A workload's table from the costs that one trial measured; the whole space is played."""
    requests = bench.requests(name)
    asked = OptimizerSection(sample=len(requests), repeats=2)
    ours = dataclasses.replace(with_fields(DEFAULTS, W8A8), optimizer=asked)
    model = bench.model(ours)
    predictor = Predictor(model.model, requests)
    trial = try_out(Models(model), ours, requests, tokenizer=bench.tokenizer)
    predictor.learn(ours, trial)
    shared = shares_beginnings(requests)
    choices = axes(requests=len(requests), precisions=[], devices=1, shared=shared)
    every = space(ours, choices, given=())
    still = with_fields(ours, {"optimizer.feedback": "off"})
    static = {c: predictor.outlook(c.applied(still)).seconds for c in every}
    turned = {c: predictor.outlook(c.applied(ours)).seconds for c in every}
    best, found = min(static, key=static.get), min(turned, key=turned.get)
    base = static[every[0]]
    print(f"\n{name}: measured {trial.seconds:.2f} s, played {turned[every[0]]:.2f} s")
    print(f"  costs {predictor.costs(ours)}; learned {dict(trial.knobs)}")
    for label, seconds, candidate in (
        ("w8a8, no feedback", base, every[0]),
        ("w8a8, feedback", turned[every[0]], every[0]),
        ("best that stays", static[best], best),
        ("search and feedback", turned[found], found),
    ):
        print(
            f"  {label:<20}{seconds:7.2f} s  on the first {base / seconds - 1:+5.0%}  on the best "
            f"{static[best] / seconds - 1:+5.0%}: {candidate.text()}",
            flush=True,
        )


def exhaustive(bench: Bench, name: str) -> None:
    """All of a small space, and what a short search finds in it."""
    requests = bench.requests(name)
    config = with_fields(DEFAULTS, W8A8)
    sample = dict(sample=len(requests), repeats=2)
    four = dataclasses.replace(config, optimizer=OptimizerSection(trials=4, **sample))
    stay = dict(choices=SMALL, given=("engine.prefill_sizes", "engine.speculation"))
    short = bench.search(requests, four, **stay)
    every = dataclasses.replace(config, optimizer=OptimizerSection(trials=1000, **sample))
    all_ = bench.search(requests, every, margin=float("inf"), **stay)
    measured = {one.candidate: one.trial.seconds for one in all_.tried}
    print(f"\n{name}: {len(measured)} candidates; predicted just before each was measured")
    for one in all_.tried:
        print(
            f"  predicted {one.predicted:6.2f} s, measured {one.trial.seconds:6.2f} s, error "
            f"{one.error:+4.0%}: {one.candidate.text()}"
        )
    winner, best = measured[short.best.candidate], min(measured.values())
    print(
        f"a search of {len(short.tried)} trials chose {short.best.candidate.text()}: "
        f"{winner / best - 1:.1%} behind the best"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", default="short,long,tail,shared,extract")
    parser.add_argument("--exhaustive", default="", help="workload whose small space is measured")
    parser.add_argument("--simulate", action="store_true")
    asked = parser.parse_args()
    bench = Bench()
    if asked.exhaustive:
        exhaustive(bench, asked.exhaustive)
        return
    for name in asked.workloads.split(","):
        if asked.simulate:
            simulate(bench, name)
        else:
            contest(bench, name, asked.repeats)


if __name__ == "__main__":
    main()
