"""`recover`: a compressed model in, the same model nearer to the dense one out.

    loaded, told = recover(student, teacher, RecoverySection(train="all"), folder=Path("state"))

The training is `training.py`; here it is kept on disk, so that it goes on after it was killed, and
told of. The dense model is a `quality.Reference` on windows of text: `quality.reference`. As a part
of compression: `lepton_jax/jobs/recovery.py`; in Python: `LeptonOptimizer.recover`.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.checkpoints.train_state import TrainStates
from lepton_jax.compression.quality import Reference
from lepton_jax.compression.training import Counters, Listen, State, Training
from lepton_jax.config import RecoverySection

_SAVE_SECONDS = 60.0  # at most so much work is lost


def recover(
    student: Loaded,
    teacher: Reference,
    section: RecoverySection,
    *,
    folder: Path | None = None,
    listen: Listen | None = None,
) -> tuple[Loaded, dict[str, Any]]:
    """The recovered model, and what to tell of the training, in JSON types.

    Args:
      student: compressed; its leaves keep their types and sizes.
      teacher: the dense model on windows of text.
      section: how to train.
      folder: where the training is kept; one that is there goes on. None: nowhere.
      listen: called as `Training.run` says.

    Raises ValueError where nothing can be trained, or the loss is not finite.
    """
    leaves = dict(zip(student.model.specs, student.leaves, strict=True))
    training = Training(student.model, leaves, teacher, section)
    state, keep = training.start(), None
    if folder is not None:
        states = TrainStates(folder)
        keep, found = _Saver(states).keep, states.restore(state.arrays)
        if found is not None:
            state = State(found[0], Counters(**found[1]))
    began = state.counters.step
    trained, counters = training.run(state, keep=keep, listen=listen)
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


class _Saver:
    """Saves a state, but not more often than once in `_SAVE_SECONDS`."""

    def __init__(self, states: TrainStates):
        self._states, self._saved = states, time.monotonic()

    def keep(self, state: State) -> None:
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._states.save(state.arrays, state.counters._asdict())
            self._saved = time.monotonic()
