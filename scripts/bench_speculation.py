r"""What speculation gives on a model, beside plain decoding, in one process and taking turns.

    python scripts/bench_speculation.py --preset=w8a8
    python scripts/bench_speculation.py --preset=none --draft=w8a8 --workloads=copy,story

For each workload and number of rows the engines off, lookup and, with --draft, draft (the model
itself, compressed by that preset, or the model at that path, such as one with fewer layers) serve
the same requests; a line a case: seconds of decode, the ratio to off, acceptance, tokens a step,
and how many texts are those of off. Greedy; medians.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lepton_jax.api import LeptonEngine
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.load import load_compressed
from lepton_jax.compression.presets import PRESETS
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.telemetry import StepStats

FRUIT = "apples pears plums figs grapes dates limes kiwis melons mangos cherries lemons".split()


def table(first: int) -> str:
    lines = [
        f"| {place + first} | {name} | {3 * place + first}.50 | store {'ABCD'[place % 4]} |"
        for place, name in enumerate(FRUIT)
    ]
    return "\n".join(lines)


def copy_prompt(number: int) -> str:
    """Extraction: the answer is nearly all in the prompt."""
    head = "| id | fruit | price | place |\n"
    ask = "The same table once more, without any change:\n"
    return f"Here is a table:\n{head}{table(number)}\n\n{ask}{head}"


def story_prompt(number: int) -> str:
    """Free text: little to look up."""
    return f"Story {number}. Once upon a time, in a village by the sea, there lived"


WORKLOADS = {"copy": (copy_prompt, 0.0), "story": (story_prompt, 0.8)}


class Contender:
    """An engine and what its runs took."""

    def __init__(self, engine: Engine, params: SamplingParams):
        self.engine, self.params, self.runs = engine, params, []
        self.tokens: dict[str, list[int]] = {}

    def run(self, prompts: list[list[int]]) -> None:
        self.engine.forget()
        before = StepStats.of(self.engine.stats())
        self.tokens = {str(number): [] for number in range(len(prompts))}
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), prompt, self.params)
        while self.engine.has_work:
            for output in self.engine.step():
                self.tokens[output.request_id] += output.token_ids
        self.runs.append(StepStats.of(self.engine.stats()) - before)

    def seconds(self) -> float:
        return statistics.median(run.decode_seconds for run in self.runs)


def measure(
    lepton: LeptonEngine, draft: Loaded | None, args: argparse.Namespace, *, name: str, rows: int
) -> None:
    make_prompt, temperature = WORKLOADS[name]
    prompts = [lepton.tokenizer.encode(make_prompt(number)) for number in range(rows)]
    params = SamplingParams(max_tokens=args.new, ignore_eos=True, temperature=temperature, seed=1)
    longest = max(map(len, prompts)) + args.new
    plain = EngineSection(rows=rows, max_len=longest, draft_tokens=args.draft_tokens)
    kinds = ["off", "lookup", *(["draft"] if draft else [])]
    contenders = {}
    for kind in kinds:
        section = dataclasses.replace(plain, speculation=kind, draft_cost=args.draft_cost)
        engine = Engine(lepton.loaded.model, lepton.loaded.leaves, section=section)
        if kind == "draft":
            engine.draft_with(draft.model, draft.leaves, cost=args.draft_cost)
        contenders[kind] = Contender(engine, params)
    for turn in range(args.rounds + 2):
        for contender in contenders.values():
            contender.run(prompts)
            if turn < 2:  # compiles, and measures its steps
                contender.runs.clear()
    base = contenders["off"]
    for kind, contender in contenders.items():
        last = contender.runs[-1]
        same = sum(contender.tokens[key] == base.tokens[key] for key in base.tokens)
        record = dict(
            workload=name,
            rows=rows,
            kind=kind,
            decode_seconds=round(contender.seconds(), 3),
            speedup=round(base.seconds() / contender.seconds(), 2),
            acceptance=last.acceptance and round(last.acceptance, 3),
            tokens_per_step=last.tokens_per_step and round(last.tokens_per_step, 2),
            verified_steps=f"{last.verified_steps}/{last.decode_steps}",
            same_texts=f"{same}/{rows}",
        )
        print(json.dumps(record), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--preset", default="w8a8")
    parser.add_argument(
        "--draft", default="", help="preset of the model as its own draft model, or a model's path"
    )
    parser.add_argument("--draft_tokens", type=int, default=7)
    parser.add_argument("--draft_cost", type=float, default=0.0, help="as engine.draft_cost")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--workloads", default="copy,story")
    parser.add_argument("--new", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    lepton = LeptonEngine().load_model(args.model, compression=args.preset)
    draft = None
    if args.draft:
        other = args.draft not in PRESETS
        section = dataclasses.replace(lepton.config.model, path=args.draft if other else args.model)
        draft = load_compressed(section, Recipe.of(preset="none" if other else args.draft))
    for name in args.workloads.split(","):
        for rows in map(int, args.rows.split(",")):
            measure(lepton, draft, args, name=name, rows=rows)


if __name__ == "__main__":
    main()
