"""Numbers of a running job for TensorBoard, through tensorboardX.

    tensorboard --logdir DIR

The step of a job is the number of rows that this run has answered, that of a recovery its updates.
Read next: `trace.py`, `recovery.py`.
"""

from collections.abc import Mapping

from lepton_jax.jobs.files.places import JobError, need, reason


class ScalarLog:
    """Event files in a folder, local or whatever tensorboardX writes to."""

    def __init__(self, folder: str, *, group: str = "job", field: str = "job.tensorboard"):
        """Raises JobError where the package is missing or the folder can't be written.

        `group` comes before the names of values; `field` is what the config calls the folder.
        """
        self._group = group
        writers = need("tensorboardX", "tensorboard", why=field)
        try:
            self._writer = writers.SummaryWriter(folder, flush_secs=10)
        except OSError as error:
            raise JobError(f"{field}={folder!r} can't be written: {reason(error)}") from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{self._group}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
