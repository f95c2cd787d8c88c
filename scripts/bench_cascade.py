r"""What a cascade promises and what it costs, beside its two models alone, on a real model.

    python scripts/bench_cascade.py --rows=2000

Messages of customers are made of the recipe's (configs/recipes/intents.py): an opening, a message
and an ending, all different, in an order drawn by --seed. Two jobs classify them, the dense model's
and the cascade's, in files as `lepton_jax.run` does, after their programs are compiled. A line a
job: seconds, and for the cascade their ratio to the dense model's, the share of rows with the dense
model's label, of all and of those after the calibration, with exact 95 % intervals, and what the
cascade itself says of these. The last line replays what both models said in --orders other orders:
how often the promise was kept on the rows after the calibration, and how many rows were escalated.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import random
import runpy
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lepton_jax.api import LeptonEngine
from lepton_jax.config import (
    CascadeSection,
    CompressionSection,
    EngineSection,
    JobSection,
    ModelSection,
    RunConfig,
    ScoringSection,
)
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.mode_for import mode_for
from lepton_jax.jobs.promise import Promise, Verdict, clopper_pearson

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "recipes"
OPENINGS = (
    "Hello,|Hi there,|Good morning.|To whom it may concern,|I am writing about order 4417.|"
    "This is the second time I write.|I have been a customer for years.|Quick question.|"
    "Please help me.|My name is Anna Berg.|As I said on the phone,|I bought a lamp last week."
).split("|")
ENDINGS = (
    "Thanks.|Please answer soon.|Kind regards, Tom|I look forward to your answer.|It is urgent.|"
    "You can call me in the evening.|Best wishes|What can I do?|I hope you can help.|"
    "My number is 555 0147.|Thank you for your time.|Sorry for the trouble."
).split("|")


def messages(count: int, seed: int) -> list[str]:
    """So many different ones. Raises ValueError where there are fewer."""
    lines = (RECIPES / "data" / "intents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    found = [" ".join(parts) for parts in itertools.product(OPENINGS, texts, ENDINGS)]
    if count > len(found):
        raise ValueError(f"--rows={count}: want at most {len(found)}")
    random.Random(seed).shuffle(found)
    return found[:count]


def promise_of(args: argparse.Namespace) -> CascadeSection:
    return CascadeSection(agreement=args.agreement, calibration=args.calibration)


def config_of(args: argparse.Namespace, kind: str, source: Path) -> RunConfig:
    recipe = runpy.run_path(str(RECIPES / "intents.py"))["get_config"]()
    return RunConfig(
        model=ModelSection(args.model, dtype=args.dtype),
        engine=EngineSection(page_size=16),
        compression=CompressionSection(preset="none" if kind == "dense" else args.preset),
        cascade=promise_of(args) if kind == "cascade" else CascadeSection(),
        scoring=ScoringSection(**recipe["scoring"]),
        job=JobSection("classify", str(source), str(source.with_name(f"{kind}.jsonl"))),
    )


def run(args: argparse.Namespace, kind: str, source: Path) -> tuple[list[dict], float, dict]:
    """(output rows, seconds, the cascade's account) of a job whose programs are compiled."""
    config = config_of(args, kind, source)
    with LeptonEngine() as lepton:
        lepton.load_model(config=config)
        mode = mode_for(config)
        with Job(config, mode) as job:
            job.resume(lepton.fingerprint)
            workload = job.workload(lepton.tokenizer)
            lepton.start(workload=workload)
            engine = lepton.engine
            for each in [engine.compressed, engine.dense] if kind == "cascade" else [engine]:
                each.warm_up(workload)
            warm_up(config, lepton, source)
            tally = job.run(engine, lepton.tokenizer)
        rows = [json.loads(line) for line in Path(job.output.path).read_text().splitlines()]
    return rows, tally.seconds, mode.account() if kind == "cascade" else {}


def warm_up(config: RunConfig, lepton: LeptonEngine, source: Path) -> None:
    """A job of the first rows."""
    first = source.with_name("first.jsonl")
    first.write_text("".join(source.read_text().splitlines(keepends=True)[:8]))
    section = dataclasses.replace(
        config.job, input=str(first), output=str(first.with_name("warm.jsonl")), restart=True
    )
    config = dataclasses.replace(config, job=section)
    with Job(config, mode_for(config)) as job:
        job.resume(lepton.fingerprint)
        job.run(lepton.engine, lepton.tokenizer)
    lepton.engine.forget()


def shares(rows: list[dict], dense: list[dict]) -> dict:
    """Of rows with the dense model's label."""
    differing = sum(a["label"] != b["label"] for a, b in zip(rows, dense, strict=True))
    low, high = (round(1 - share, 5) for share in clopper_pearson(differing, len(rows))[::-1])
    mean = round(1 - differing / len(rows), 5)
    return {"rows": len(rows), "differing": differing, "mean": mean, "low": low, "high": high}


def replays(args: argparse.Namespace, rows: list[dict], dense: list[dict]) -> dict:
    """The promise in other orders of the same rows, by what both models said of each."""
    said = [
        (row["cascade"]["margin"], best["label"] == row["label"] if same is None else same)
        for row, best in zip(rows, dense, strict=True)
        for same in [row["cascade"]["same"]]
    ]
    agreements, escalated = [], []
    logging.disable(logging.WARNING)
    for seed in range(args.orders):
        order = random.Random(seed).sample(range(len(said)), len(said))
        promise = Promise(promise_of(args))
        after = agreed = 0
        for place in order:
            margin, same = said[place]
            why = promise.why_dense(str(place), margin)
            after += why != "calibration"
            agreed += why != "calibration" and (same or bool(why))
            model = "dense" if why else "compressed"
            promise.observe(Verdict(model, why or "sure", margin, same if why else None))
        agreements.append(agreed / after)
        escalated.append(promise.account()["escalated"])
    agreements.sort()
    return {
        "orders": args.orders,
        "kept": sum(share >= args.agreement for share in agreements),
        "agreement": [round(agreements[n], 5) for n in (0, args.orders // 2, -1)],
        "escalated": round(statistics.mean(escalated), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="float32", help="of the dense model")
    parser.add_argument("--preset", default="w8a8", help="of the compressed one")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--agreement", type=float, default=0.99)
    parser.add_argument("--calibration", type=int, default=0)
    parser.add_argument("--orders", type=int, default=500, help="replays")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    calibration = Promise(promise_of(args)).account()["calibration"]
    if args.rows <= calibration:
        parser.error(f"--rows={args.rows}: want more than the {calibration} of the calibration")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "messages.jsonl"
        texts = messages(args.rows, args.seed)
        source.write_text(
            "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts))
        )
        dense, alone, _ = run(args, "dense", source)
        print(json.dumps({"kind": "dense", "seconds": round(alone, 2)}), flush=True)
        rows, seconds, account = run(args, "cascade", source)
    after = [n for n, row in enumerate(rows) if row["cascade"]["why"] != "calibration"]
    record = {
        "kind": "cascade",
        "seconds": round(seconds, 2),
        "of_dense": round(seconds / alone, 3),
        "agreement": shares(rows, dense),
        "held_out": shares([rows[n] for n in after], [dense[n] for n in after]),
        "says": account,
    }
    print(json.dumps(record), flush=True)
    print(json.dumps({"kind": "replays"} | replays(args, rows, dense)), flush=True)


if __name__ == "__main__":
    main()
