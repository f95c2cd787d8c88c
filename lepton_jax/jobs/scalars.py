"""Numbers of a running job for TensorBoard, through tensorboardX.

    tensorboard --logdir DIR

The step is the number of rows that this run has answered. Read next: `trace.py`.
"""

from collections.abc import Mapping

from lepton_jax.jobs.files.places import JobError, need, reason


class ScalarLog:
    """Event files in a folder, local or whatever tensorboardX writes to."""

    def __init__(self, folder: str):
        """Raises JobError where the package is missing or the folder can't be written."""
        writers = need("tensorboardX", "tensorboard", why="job.tensorboard")
        try:
            self._writer = writers.SummaryWriter(folder, flush_secs=10)
        except OSError as error:
            raise JobError(
                f"job.tensorboard={folder!r} can't be written: {reason(error)}"
            ) from error

    def add(self, rows: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"job/{name}", value, rows)

    def close(self) -> None:
        self._writer.close()
