"""Scoring and classification beside Hugging Face transformers, on this machine, taking turns.

    python scripts/compare_scoring.py --peers-python=/tmp/peer/bin/python [--rows=500] [--rounds=2]

Texts: 256 of 20 to 200 random tokens, all tokens scored; tokens/s. Rows: an instruction of 400
tokens that all share, 10 to 50 tokens of their own, 4 labels of 1 or 2 tokens; rows/s. transformers
goes over the rows in two ways, one forward a row (first ids of the labels) and one a label; its
rates come from `--peer-rows` of the rows, since it shares nothing between them. Each contender is
its own process and all stay loaded; the best round of each counts. Ratios by processor time, in
parentheses, mean more where others use the machine. The peers' environment needs the `peers` extra.
"""

import argparse
import json
import os
import random
import sys

from compare_peers import Worker, table

from lepton_jax.checkpoints.demo import cache_folder, demo_model

VOCAB = 49_152  # of SmolLM2
LABELS = [[8_000], [9_000], [10_000, 11_000], [10_000, 12_000]]


def texts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(f"texts {seed}")
    return [ids(draw, draw.randint(20, 200)) for _ in range(count)]


def rows(count: int, seed: int) -> list[list[int]]:
    draw, instruction = random.Random(f"rows {seed}"), ids(random.Random("instruction"), 400)
    return [instruction + ids(draw, draw.randint(10, 50)) for _ in range(count)]


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCAB) for _ in range(count)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers-python", default=sys.executable, help="interpreter that has the `peers` extra")
    add("--presets", default="none:float32,none:bfloat16,w8a8:bfloat16", help="PRESET:DTYPE, ours")
    add("--types", default="float32,bfloat16", help="dtypes of transformers")
    add("--measure", default="texts,rows", help="texts, rows or both")
    add("--texts", type=int, default=256, help="how many texts")
    add("--rows", type=int, default=500, help="how many rows to classify")
    add("--peer-rows", type=int, default=16, help="of them for transformers")
    add("--page-size", type=int, default=16, help="ours, for the rows; texts take the default")
    add("--rounds", type=int, default=2, help="timed runs of each contender")
    return parser.parse_args(argv)


def contenders(options: argparse.Namespace, measure: str) -> dict[str, tuple[dict, int]]:
    """(spec, items) by name."""
    shared = {
        "model": str(demo_model("smollm2")),
        "cache": str(cache_folder().parent / "peers"),
        "threads": os.cpu_count(),
        "labels": LABELS if measure == "rows" else [],
        "prepare": False,
    }
    page_size = options.page_size if measure == "rows" else 64
    found = {}
    for name in options.presets.split(","):
        preset, _, dtype = name.partition(":")
        spec = {
            "engine": "our scoring",
            "preset": preset,
            "dtype": dtype or "auto",
            "page_size": page_size,
        }
        count = options.rows if measure == "rows" else options.texts
        found[f"ours {name}"] = shared | spec, count
    for kind in options.types.split(","):
        spec = shared | {"engine": "transformers scoring", "type": kind}
        if measure == "texts":
            found[f"transformers {kind}"] = spec | {"way": ""}, options.texts
            continue
        for way in ("row", "label"):
            name = f"transformers {kind}, a forward a {way}"
            found[name] = spec | {"way": way}, options.peer_rows
    return found


def prepare(options: argparse.Namespace, specs: dict[str, tuple[dict, int]]) -> None:
    """Makes transformers' model files where they are missing."""
    kinds = {spec["type"]: spec for spec, _ in specs.values() if "type" in spec}
    for kind, spec in kinds.items():
        made = spec | {"engine": "transformers", "prepare": True}
        worker = Worker(f"transformers {kind}", options.peers_python, made)
        try:
            worker.wait()
        finally:
            worker.stop()


def compare(options: argparse.Namespace, measure: str) -> dict[str, tuple[float, float]]:
    """Best rates of each contender, a second and a second of processor time: tokens of texts, or
    rows.
    """
    make, specs = {"texts": texts, "rows": rows}[measure], contenders(options, measure)
    prepare(options, specs)
    workers: dict[str, Worker] = {}
    best = {name: (0.0, 0.0) for name in specs}
    try:
        for name, (spec, count) in specs.items():
            python = sys.executable if spec["engine"] == "our scoring" else options.peers_python
            workers[name] = Worker(name, python, spec)
            workers[name].ask(make(count, 0), warm_up=True)
        for number in range(1, options.rounds + 1):
            for name, (_, count) in specs.items():
                answer = workers[name].ask(make(count, number))
                rates = [answer["tokens"] / answer[key] for key in ("seconds", "cpu_seconds")]
                best[name] = tuple(map(max, best[name], rates))
                print(
                    f"{measure} {number} {name}: {json.dumps(answer)}", file=sys.stderr, flush=True
                )
    finally:
        for worker in workers.values():
            worker.stop()
    return best


def report(measure: str, best: dict[str, tuple[float, float]]) -> str:
    """A table of rates and of our ratios to each contender, by time and by processor time."""
    ours = [name for name in best if name.startswith("ours ")]
    unit = "tokens" if measure == "texts" else "rows"
    lines = [[measure, f"{unit}/s", f"{unit}/CPU s", *(f"{name} is" for name in ours)]]
    for name, rates in best.items():
        ratios = [[b / a for a, b in zip(rates, best[own], strict=True)] for own in ours]
        cells = [f"{by_time:.2f} x ({by_cpu:.2f} x)" for by_time, by_cpu in ratios]
        lines.append([name, *(f"{rate:.4g}" for rate in rates), *cells])
    return table(lines)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    for measure in options.measure.split(","):
        print(report(measure, compare(options, measure)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
