"""The bench driver: how fast the engine is on this machine, one JSON line per measurement.

    python -m lepton_jax.bench --config=configs/bench.py [--config.section.field=value ...]

Measured are cold and warm start, decode at 1, 8 and 32 rows, prefill of 512 x 1 and 512 x 8 tokens
and a job of 256 prompts. Exit codes: 0 all measured, 2 the set-up failed. Read next:
`jobs/workloads.py` (what is measured), `jobs/benchmark.py` (how).
"""

import json
import sys

from lepton_jax import cli
from lepton_jax.config import RunConfig


def main(config: RunConfig) -> int:
    """All measurements of a config; the exit code."""
    # Imported here so that --help and mistakes in flags don't wait for jax.
    from lepton_jax.api import LeptonEngine
    from lepton_jax.jobs import benchmark, starts, workloads

    with cli.user_errors(ValueError, OSError):
        config.require_one_engine("bench")
        if config.engine.speculation == "draft":
            raise ValueError(
                "bench measures one model, without a draft: leave out engine.speculation=draft "
                "(scripts/bench_speculation.py measures it)"
            )
        config.require_no_feedback("bench")
        names = workloads.select(config.bench.measure)
        if workloads.STARTS in names:
            for record in starts.measure_starts(sys.argv[1:], repeats=config.bench.repeats):
                print(json.dumps(record), flush=True)
        works = [workloads.WORKLOADS[name] for name in names if name in workloads.WORKLOADS]
        if not works and workloads.FIRST_TOKEN not in names:
            return 0
        loaded = LeptonEngine().load_model(config=config).loaded
        if workloads.FIRST_TOKEN in names:
            job = workloads.WORKLOADS["job"]
            print(json.dumps(benchmark.first_token(loaded, config, job)), flush=True)
        for work in works:
            print(json.dumps(benchmark.measure(loaded, config, work)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_driver(main))
