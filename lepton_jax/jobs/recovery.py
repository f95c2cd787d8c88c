"""Recovery as part of a compression: what it keeps on disk, and what it shows meanwhile.

    OUTPUT.recovery/student/      the compressed model before training, beside it made.json, and
                                  plan.json: how, so that only the same command goes on with it
    OUTPUT.recovery/step-*/       the training: what is trained, Adam's moments, the best so far

A killed command goes on from there when it is given again; the folder goes when the result is
written. The training itself is `compression/recover.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.compression.quality import Reference
from lepton_jax.compression.recover import recover
from lepton_jax.config import RecoverySection

_PLAN, _STUDENT, _MADE = "plan.json", "student", "made.json"
Progress = Callable[[int, int, str], None]


def folder_of(output: str | Path) -> Path:
    """Where the recovery of an output keeps its files."""
    output = Path(output).expanduser().absolute()
    return output.with_name(f"{output.name}.recovery")


class RecoveryFolder:
    """What a recovery keeps on disk while it is under way."""

    def __init__(self, output: str | Path, plan: Mapping[str, Any]):
        """A new folder, or one of the same plan.

        Raises ValueError where it holds something else.
        """
        self.path, self._plan = folder_of(output), json.loads(json.dumps(plan))
        place = self.path / _STUDENT / _PLAN
        self.path.mkdir(parents=True, exist_ok=True)
        if all(file.name.startswith(".") for file in self.path.iterdir()):
            return
        found = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        other = [key for key in self._plan if found.get(key) != self._plan[key]]
        if other:
            raise ValueError(
                f"{self.path} holds an interrupted recovery with another {', '.join(other)}: give "
                "the same command again, or remove that folder"
            )

    def student(
        self, make: Callable[[], tuple[Loaded, dict[str, Any]]]
    ) -> tuple[Loaded, dict[str, Any]]:
        """The compressed model and what is told of it: as kept, or made now and kept."""
        place = self.path / _STUDENT
        if place.is_dir():
            told = json.loads((place / _MADE).read_text(encoding="utf-8"))
            return checkpoints.load(place), told
        loaded, told = make()

        def complete(folder: Path) -> None:
            for name, value in ((_MADE, told), (_PLAN, self._plan)):
                (folder / name).write_text(json.dumps(value), encoding="utf-8")

        save(place, loaded, complete=complete)
        return loaded, told


def train(
    student: Loaded,
    teacher: Reference,
    section: RecoverySection,
    *,
    folder: Path,
    progress: Progress,
) -> tuple[Loaded, dict[str, Any]]:
    """The recovered model and what to tell of it: `compression.recover`, shown.

    `progress` is called with (step, steps, what) after each step.
    """
    held_out = ""

    def listen(step: int, found: Mapping[str, float]) -> None:
        nonlocal held_out
        if "held_out_kl" in found:
            held_out = f", {found['held_out_kl']:.4f} held out"
        progress(step, section.steps, f"KL {found['kl']:.4f}{held_out}")

    return recover(student, teacher, section, folder=folder, listen=listen)
