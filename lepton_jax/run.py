"""The main driver: a file of prompts to a file of answers.

    python -m lepton_jax.run --config=configs/quickstart.py [--config.section.field=value ...]

`--helpfull` documents every field. Exit codes: 0 all rows answered, 1 some are error rows, 2 the
set-up failed or the output could not be written. Read next: `jobs/driver.py` (what happens to the
rows), `api.py` (how a model becomes an engine).
"""

import dataclasses
import functools
import sys
from typing import TYPE_CHECKING

from absl import flags

from lepton_jax import cli
from lepton_jax.config import RunConfig

if TYPE_CHECKING:
    from lepton_jax.distributed.hosts import Hosts

_REPORT = flags.DEFINE_bool("report", None, "as --config.job.report: a page about the run")
_FOLLOW = flags.DEFINE_float("follow", None, "as --config.job.follow: seconds to wait for new rows")
_EXPLAIN = flags.DEFINE_bool("explain", False, "say at the end what the optimizer did, and why")


def start(config: RunConfig) -> int:
    """`main` with what has flags of its own, so that hosts compare that too."""
    asked = {"report": _REPORT.value, "follow": _FOLLOW.value}
    given = {name: value for name, value in asked.items() if value is not None}
    with cli.user_errors(ValueError):
        config = dataclasses.replace(config, job=dataclasses.replace(config.job, **given))
    return main(config)


def main(config: RunConfig) -> int:
    """One job from its config; the exit code."""
    from lepton_jax.distributed.hosts import join
    from lepton_jax.distributed.ray_replicas import leave_devices

    leave_devices(config.pool)
    with cli.user_errors(ValueError):
        hosts = join(config)
    with hosts:
        with cli.user_errors(ValueError, OSError):
            hosts.require_same_models(config)
        return _run(config, hosts)


def _run(config: RunConfig, hosts: "Hosts") -> int:
    """The job on this host, which may be one of several."""
    # Imported here so that --help and mistakes in flags don't wait for jax.
    from lepton_jax.api import LeptonEngine
    from lepton_jax.distributed.pool import ReplicasLost
    from lepton_jax.jobs import summary as report
    from lepton_jax.jobs import tuning
    from lepton_jax.jobs.driver import Job
    from lepton_jax.jobs.files.places import JobError
    from lepton_jax.jobs.mode_for import mode_for
    from lepton_jax.jobs.report_page import report_page, write_report
    from lepton_jax.jobs.trace import trace_for
    from lepton_jax.optimizer.decisions import explained
    from lepton_jax.optimizer.space import with_fields

    with cli.user_errors(ValueError, OSError):
        if _EXPLAIN.value and config.pool.ray:
            raise ValueError("--explain tells of engines in this process: leave out pool.ray")
        config, profile, said = tuning.with_profile(config, cli.given_fields())
        if said:
            print(said, flush=True)
        if not hosts.first:
            config = with_fields(config, {"optimizer.log": ""})  # decisions are the same on all
        mode = mode_for(config)
        job = Job(config, mode, hosts=hosts)
    with job, LeptonEngine(sync=hosts if config.hosts.coordinator else None) as lepton:
        with cli.user_errors(ValueError, OSError):
            with cli.Bars() as bars:
                progress = functools.partial(bars.show, "load")
                lepton.load_model(config.model.path, config=config, progress=progress)
            if lepton.receipt:
                print(lepton.receipt["digest"], flush=True)
            job.resume(lepton.fingerprint)
            lepton.start(workload=job.workload(lepton.tokenizer), profile=profile)
            knobs = lepton.feedback.knobs if lepton.feedback else dict
            trace = trace_for(config.job, lepton.engine.stats, knobs=knobs) if hosts.first else None
        interrupts = cli.interrupts(job.end_following if config.job.follow else None)
        with cli.user_errors(JobError, ReplicasLost), interrupts:
            tally = job.run(lepton.engine, lepton.tokenizer, trace=trace)
        # Two models' work is counted against the peaks of the dense one.
        cascade = mode.account() if config.cascade.agreement else None
        loaded, devices = lepton.loaded, config.mesh.model * config.replicas
        stored = {} if cascade else {"leaves": loaded.leaves, "preset": config.compression.preset}
        cost = report.ModelCost.of(loaded.model, loaded.bytes, devices=devices, **stored)
        stats = lepton.engine.stats()
        decisions = lepton.feedback.decisions if lepton.feedback else []
        turned = lepton.feedback.count if lepton.feedback else None if config.pool.ray else 0
    if not hosts.first:
        return 0
    told = tuning.account(profile, cli.given_fields(), config=config, decisions=turned)
    parts = dict(cost=cost, output=job.output.path, cascade=cascade, optimizer=told)
    asked = config.engine.speculation
    summary = report.summarize(tally, stats, speculation=asked, **parts)
    report.write_summary(summary, job.output.summary)
    if config.job.report:
        write_report(report_page(summary, trace), job.output.report)
    print(f"{report.preview_text(tally)}\n\n{report.summary_text(summary)}")
    if _EXPLAIN.value:
        print(f"\n{explained(decisions)}")
    return 1 if tally.errors else 0


if __name__ == "__main__":
    sys.exit(cli.run_driver(start))
