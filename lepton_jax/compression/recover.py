"""`recover`: a compressed model in, the same model nearer to the dense one out.

    loaded, told = recover(student, teacher, RecoverySection(train="all"), folder=Path("state"))

The training is `training.py`; here it is kept on disk, so that it goes on after it was killed,
drawn in TensorBoard, and told of. The dense model is a `quality.Reference` on windows of text:
`quality.reference`. As a part of compression: `lepton_jax/jobs/recovery.py`; in Python:
`LeptonOptimizer.recover`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.checkpoints.loaded import Loaded, digest
from lepton_jax.checkpoints.train_state import TrainStates
from lepton_jax.compression.quality import Reference
from lepton_jax.compression.receipt import weights_sha256
from lepton_jax.compression.training import Counters, Listen, State, Training
from lepton_jax.config import RecoverySection
from lepton_jax.telemetry import ScalarLog

_SAVE_SECONDS = 60.0  # at most so much work is lost, and a step


def recover(
    student: Loaded,
    teacher: Reference,
    section: RecoverySection,
    *,
    folder: Path | None = None,
    taught_by: str = "",
    listen: Listen | None = None,
) -> tuple[Loaded, dict[str, Any]]:
    """The recovered model, and what to tell of the training, in JSON types.

    Args:
      student: compressed; its leaves keep their types and sizes.
      teacher: the dense model on windows of text.
      section: how to train.
      folder: where the training is kept; the same that is there goes on. None: nowhere.
      taught_by: fingerprint of the dense model; "" where the folder is of no other.
      listen: called as `Training.run` says.

    Raises ValueError where nothing can be trained, a folder can't be written or holds another
    training, or the loss is not finite.
    """
    leaves = dict(zip(student.model.specs, student.leaves, strict=True))
    training = Training(student.model, leaves, teacher, section)
    state, keep = training.start(), None
    if folder is not None:
        saver = _Saver(folder, training=_digest(student, teacher, section, taught_by))
        keep, state = saver.keep, saver.restored(state)
    began = state.counters.step
    with _drawn(section, listen) as heard:
        trained, counters = training.run(state, keep=keep, listen=heard)
    kept = tuple(trained[path] for path in student.model.specs)
    told = dataclasses.asdict(section) | {
        "steps_done": counters.step,
        "resumed_at": began or None,
        "seconds": counters.seconds,
        "tokens": counters.step * section.batch * int(np.shape(teacher.windows)[1]),
        "best_step": counters.best_step,
        "evaluations": [list(row) for row in counters.evaluations],
    }
    return dataclasses.replace(student, leaves=kept), told


@contextlib.contextmanager
def _drawn(section: RecoverySection, listen: Listen | None) -> Iterator[Listen | None]:
    """A listener that also draws TensorBoard's curves, where the section asks for them."""
    if not section.tensorboard:
        yield listen
        return
    log = ScalarLog(section.tensorboard, group="recovery", field="recovery.tensorboard")

    def both(step: int, found: Mapping[str, float]) -> None:
        log.add(step, found)
        if listen is not None:
            listen(step, found)

    with contextlib.closing(log):
        yield both


class _Saver:
    """Saves the states of a training, but not more often than once in `_SAVE_SECONDS`."""

    def __init__(self, folder: Path, *, training: str):
        self._folder, self._training = folder, training
        self._states, self._saved = TrainStates(folder), time.monotonic()

    def restored(self, start: State) -> State:
        """The newest state; `start`, which tells its shapes, where there is none.

        Raises ValueError where it is of another training.
        """
        found = self._states.restore(start.arrays)
        if found is None:
            return start
        arrays, counters = found
        if counters.pop("training", "") != self._training:
            raise ValueError(
                f"{self._folder} holds the training of another model, or with other windows "
                "or fields of recovery: name another folder, or remove it to start anew"
            )
        return State(arrays, Counters(**counters))

    def keep(self, state: State) -> None:
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            counters = state.counters._asdict() | {"training": self._training}
            self._states.save(state.arrays, counters)
            self._saved = time.monotonic()


def _digest(student: Loaded, teacher: Reference, section: RecoverySection, taught_by: str) -> str:
    """Of all that the steps of a training depend on: both models, the windows, the section."""
    arrays = dict(zip(student.model.specs, student.leaves, strict=True))
    arrays |= {"teacher.head": teacher.head, "teacher.windows": teacher.windows}
    weights = weights_sha256(arrays, list(arrays.values()))
    return digest([weights, taught_by, dataclasses.asdict(section) | {"tensorboard": ""}])
