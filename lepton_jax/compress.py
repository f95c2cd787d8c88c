"""The compression driver: a model in, a smaller model with its receipt out.

    python -m lepton_jax.compress --config=configs/compress_w8a8.py --config.model.path=MODEL \\
        --config.output=DIR
    python -m lepton_jax.compress --config=configs/compress_sweep.py --config.output=DIR
    python -m lepton_jax.compress --verify DIR [--dense MODEL]

`run` loads DIR like any other model; the receipt is receipt.json and receipt.html in it. Exit
codes: 0 done, 1 a receipt that isn't reproduced or a recipe of a sweep that failed, 2 the set-up
failed. Read next: `jobs/compress.py`.
"""

import sys

from absl import flags

from lepton_jax import cli
from lepton_jax.config import RunConfig

_VERIFY = flags.DEFINE_string("verify", "", "measure a compressed model again: its directory")
_DENSE = flags.DEFINE_string(
    "dense", "", "with --verify: the uncompressed model, where it isn't what the receipt says"
)


def main(config: RunConfig) -> int:
    """One recipe, or a sweep of several; the exit code."""
    # Imported here so that --help and mistakes in flags don't wait for jax.
    from lepton_jax.jobs.compress import CompressJob
    from lepton_jax.jobs.sweep import SweepJob

    with cli.user_errors(ValueError, OSError), cli.Bars() as bars:
        config.require_one_engine("compress")
        if config.sweep.recipes:
            job = SweepJob(config)
            job.run(bars.show)
            text, failed = job.table(), job.failed
        else:
            job = CompressJob(config)
            text, failed = job.run(bars.show)["digest"], {}
    print(f"{text}\n{job.output}")
    return 1 if failed else 0


def verify() -> int | None:
    """What --verify asks for; None where it isn't given."""
    with cli.user_errors(ValueError):
        if _DENSE.value and not _VERIFY.value:
            raise ValueError(
                f"--dense={_DENSE.value} goes with --verify=DIR alone: a model to compress is "
                "--config.model.path"
            )
        if _VERIFY.value and flags.FLAGS["config"].value is not None:
            raise ValueError("--verify takes all from DIR's receipt: leave out --config")
    if not _VERIFY.value:
        return None
    from lepton_jax.jobs.verify import failures, report, verify_receipt

    with cli.user_errors(ValueError, OSError), cli.Bars() as bars:
        checks = verify_receipt(_VERIFY.value, dense=_DENSE.value, progress=bars.show)
    print(report(checks))
    failed = failures(checks)
    print(
        f"{_VERIFY.value}: " + (f"not reproduced: {', '.join(failed)}" if failed else "reproduced")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run_driver(main, instead=verify))
