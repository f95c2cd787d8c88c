"""The compression driver: a model in, a smaller model with its receipt out.

    python -m lepton_jax.compress --config=configs/compress_w8a8.py --config.model.path=MODEL \\
        --config.output=DIR
    python -m lepton_jax.compress --config=configs/compress_sweep.py --config.output=DIR
    python -m lepton_jax.compress --verify DIR [--dense MODEL]

`run` loads DIR like any other model; the receipt is receipt.json and receipt.html in it. Exit
codes: 0 done, 1 a receipt that isn't reproduced, 2 the set-up failed. Read next:
`jobs/compress.py`.
"""

import sys

from absl import flags
from tqdm import tqdm

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

    with cli.user_errors(ValueError, OSError), _Bars() as bars:
        if config.sweep.recipes:
            job = SweepJob(config)
            job.run(bars.show)
            text = job.table()
        else:
            job = CompressJob(config)
            text = job.run(bars.show)["digest"]
    print(f"{text}\n{job.output}")
    return 0


def verify() -> int | None:
    """What --verify asks for; None where it isn't given."""
    if not _VERIFY.value:
        return None
    from lepton_jax.jobs.verify import failures, report, verify_receipt

    with cli.user_errors(ValueError, OSError), _Bars() as bars:
        checks = verify_receipt(_VERIFY.value, dense=_DENSE.value, progress=bars.show)
    print(report(checks))
    failed = failures(checks)
    print(
        f"{_VERIFY.value}: " + (f"not reproduced: {', '.join(failed)}" if failed else "reproduced")
    )
    return 1 if failed else 0


class _Bars:
    """A progress bar for the stage that is under way."""

    def __init__(self):
        self._bar, self._stage = None, ""

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int, what: str) -> None:
        """`done` of `total` in a stage; bytes are large numbers."""
        if stage != self._stage:
            self.__exit__()
            large = total > 1 << 16
            self._bar = tqdm(
                total=total,
                desc=f"{stage:<30}",
                unit="B" if large else "",
                unit_scale=large,
                dynamic_ncols=True,
            )
            self._stage = stage
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)


if __name__ == "__main__":
    sys.exit(cli.run_driver(main, instead=verify))
