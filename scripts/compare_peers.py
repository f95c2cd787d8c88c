#!/usr/bin/env python3
"""Speed of this engine beside transformers and llama.cpp: one run, one machine, taking turns.

    pip install -e '.[peers]'
    python scripts/compare_peers.py --rounds=3 --json=peers.json

For every measurement each contender runs in a process of its own; after a warm-up that isn't
counted they take turns, one timed run each per round, and the best round counts. All get the same
random token ids and continue them greedily for the same number of tokens, which is checked.
Printed: tokens/s, peak memory and ratios, as Markdown tables. On a machine that does other things
meanwhile, set OMP_WAIT_POLICY=passive: the peers' threads otherwise wait in spinning loops and take
many times as long. Workloads: `lepton_jax/jobs/workloads.py`. Contenders: `scripts/peers/`.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lepton_jax.checkpoints.demo import cache_folder, demo_model
from lepton_jax.checkpoints.gguf_files import open_gguf
from lepton_jax.jobs.workloads import WORKLOADS, Workload

WORKER = Path(__file__).parent / "peers" / "worker.py"
PEERS = "transformers:float32,transformers:bfloat16,llama.cpp:BF16,llama.cpp:Q8_0,llama.cpp:Q4_0"
PRESETS = "none:float32,none:bfloat16,int8,w8a8"
PATIENCE = 10  # seconds for a process to end by itself


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="", help="a .gguf file; by default SmolLM2-135M-Instruct, fetched once")
    add("--presets", default=PRESETS, help=f"ours, PRESET or PRESET:DTYPE (default {PRESETS})")
    add("--peers", default=PEERS, help=f"ENGINE:TYPE (default {PEERS}); empty: none")
    add("--peers-python", default=sys.executable, help="interpreter that has the `peers` extra")
    add("--measure", default="all", help=f"all, or some of {','.join(WORKLOADS)}")
    add("--rounds", type=int, default=3, help="timed runs of each contender (default 3)")
    add("--threads", type=int, default=os.cpu_count(), help="of the peers (default: all cores)")
    add("--slots", type=int, default=32, help="sequences of llama.cpp in the job (default 32)")
    add("--batches", default="32,64,128", help="batch sizes that transformers tries in the job")
    add("--engine", default="{}", help='JSON fields of our engine section, such as {"rows": 64}')
    add("--json", default="", help="file for all figures")
    options = parser.parse_args(argv)
    names = list(WORKLOADS) if options.measure == "all" else options.measure.split(",")
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        parser.error(f"--measure={unknown[0]} is unknown: allowed are {', '.join(WORKLOADS)}")
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: want 1 or more")
    options.workloads = [WORKLOADS[name] for name in names]
    options.model = str(Path(options.model).resolve() if options.model else demo_model("smollm2"))
    return options


def contenders(options: argparse.Namespace) -> dict[str, dict]:
    """What each contender's process is told, by the name in the tables."""
    shared = {
        "model": options.model,
        "cache": str(cache_folder().parent / "peers"),
        "threads": options.threads,
    }
    found = {}
    for text in filter(None, options.presets.split(",")):
        preset, _, dtype = text.partition(":")
        spec = {"preset": preset, "dtype": dtype or "auto"}
        spec["engine_section"] = json.loads(options.engine)
        found[f"ours {text}"] = shared | spec | {"engine": "ours"}
    batches = [int(size) for size in options.batches.split(",")]
    for text in filter(None, options.peers.split(",")):
        engine, _, kind = text.partition(":")
        spec = {"engine": engine, "type": kind, "batches": batches, "slots": options.slots}
        found[f"{engine} {kind}"] = shared | spec
    return found


class Worker:
    """A contender's process, set up for one workload."""

    def __init__(self, name: str, python: str, spec: dict):
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [python, str(WORKER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, prompts: list[list[int]], *, warm_up: bool = False) -> dict:
        """One run. Raises RuntimeError with the process's last words where there is no answer."""
        try:
            print(json.dumps({"prompts": prompts, "warm_up": warm_up}), file=self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("the process is gone") from None
        return self._answer()

    def finish(self) -> dict:
        """Lets the process end; its last answer."""
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait(PATIENCE)
        return answer

    def wait(self) -> None:
        """For a process that only prepares files."""
        self._process.stdin.close()
        said = self._process.stdout.read()
        if self._process.wait():
            raise self._failure(said.strip())

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended without an answer"}
        if "error" in answer:
            raise self._failure(answer["error"])
        return answer

    def _failure(self, why: str) -> RuntimeError:
        self._log.seek(0)
        return RuntimeError(f"{self.name}: {why}\n{self._log.read()[-2000:]}")


def start(options: argparse.Namespace, name: str, spec: dict, **more) -> Worker:
    python = sys.executable if spec["engine"] == "ours" else options.peers_python
    return Worker(name, python, spec | {"prepare": False} | more)


def prepare(options: argparse.Namespace, specs: dict[str, dict]) -> None:
    """Makes the peers' model files, so that no measured process has to."""
    Path(next(iter(specs.values()))["cache"]).mkdir(parents=True, exist_ok=True)
    for name, spec in specs.items():
        if spec["engine"] != "ours":
            worker = start(options, name, spec, prepare=True)
            try:
                worker.wait()
            finally:
                worker.stop()


def compare(
    options: argparse.Namespace, specs: dict[str, dict], workload: Workload, vocab: int
) -> dict[str, dict]:
    """The record of each contender on one workload."""
    more = {"workload": dataclasses.asdict(workload), "longest": max(workload.lengths())}
    workers, rates = [], {name: [] for name in specs}
    try:
        for name, spec in specs.items():
            workers.append(start(options, name, spec, **more))
            workers[-1].ask(workload.prompts(0, vocab), warm_up=True)
        for number in range(1, options.rounds + 1):
            prompts = workload.prompts(number, vocab)
            for worker in workers:
                answer = worker.ask(prompts)
                check(worker.name, workload, answer["tokens"])
                rates[worker.name].append(answer["tokens"] / answer["seconds"])
        peaks = {worker.name: worker.finish()["peak_rss_mb"] for worker in workers}
    finally:
        for worker in workers:
            worker.stop()
    return {
        name: {"best": max(rates[name]), "rates": rates[name], "peak_rss_mb": peaks[name]}
        for name in specs
    }


def check(name: str, workload: Workload, tokens: int) -> None:
    """Raises RuntimeError on a wrong count; our decode leaves the first block of each row out."""
    partial = workload.kind == "decode" and name.startswith("ours ")
    least = workload.counted // 2 if partial else workload.counted
    if not least <= tokens <= workload.counted:
        raise RuntimeError(
            f"{name}: {workload.name} counted {tokens} tokens, not {workload.counted}"
        )


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def report(results: dict[str, dict[str, dict]], names: list[str]) -> str:
    """Two tables: tokens/s with peak memory, and ratios of our presets to each peer."""
    head = list(results)
    speeds = [["tokens/s", *head, "peak RSS MiB"]]
    for name in names:
        records = [results[work][name] for work in head]
        peaks = [record["peak_rss_mb"] for record in records]
        best = [f"{record['best']:.0f}" for record in records]
        speeds.append([name, *best, f"{min(peaks)}-{max(peaks)}"])
    ours = [name for name in names if name.startswith("ours ")]
    ratios = [["ratio", *head]]
    for peer in (name for name in names if name not in ours):
        for label, choose in (("best", max), ("slowest", min)) if ours else ():
            cells = []
            for work in head:
                chosen = choose(ours, key=lambda name, work=work: results[work][name]["best"])
                ratio = results[work][chosen]["best"] / results[work][peer]["best"]
                cells.append(f"{ratio:.2f} ({chosen.removeprefix('ours ')})")
            ratios.append([f"our {label} / {peer}", *cells])
    return table(speeds) + ("\n\n" + table(ratios) if len(ratios) > 1 else "")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    specs = contenders(options)
    vocab = len(open_gguf(Path(options.model))[0]["tokenizer.ggml.tokens"])
    prepare(options, specs)
    results: dict[str, dict[str, dict]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for workload in options.workloads:
            begun = time.perf_counter()
            results[workload.name] = compare(options, specs, workload, vocab)
            seconds = time.perf_counter() - begun
            print(f"{workload.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    finally:  # an interrupted run keeps what it has measured
        if results:
            print(report(results, list(specs)), flush=True)
        if results and options.json:
            Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
