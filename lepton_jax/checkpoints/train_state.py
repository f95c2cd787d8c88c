"""Where a training stands, on disk, so that it can go on after it was killed.

    TrainStates(folder).save(state.arrays, {"step": 40})
    TrainStates(folder).restore(like)      # the newest, or None

Each state is a folder by Orbax with a JSON file beside the arrays; it appears under its name when
it is complete, and older ones go then. What is trained is `lepton_jax/compression/recover.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from lepton_jax.checkpoints import orbax_arrays
from lepton_jax.checkpoints.errors import CheckpointError, naming_damage

_ARRAYS, _COUNTERS, _PARTIAL = "arrays", "counters.json", ".partial"


class TrainStates:
    """The states of one training."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, arrays: Any, counters: dict[str, Any]) -> None:
        """A tree of arrays and JSON counters, whose "step" names the state.

        Raises CheckpointError where it can't be written; the last one is left then.
        """
        place = self._folder / f"step-{counters['step']:08}"
        scratch = place.with_suffix(_PARTIAL)
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            scratch.mkdir(parents=True)
            named = {str(i): array for i, array in enumerate(jax.tree.leaves(arrays))}
            orbax_arrays.write(scratch / _ARRAYS, named)
            (scratch / _COUNTERS).write_text(json.dumps(counters) + "\n", encoding="utf-8")
            os.replace(scratch, place)
        except Exception as error:  # Orbax raises errors of several storage layers
            raise CheckpointError(
                f"{place} can't be written: {type(error).__name__}: {str(error)[:300]}. Check the "
                "space and permissions of its disk"
            ) from error
        for older in self._folder.iterdir():
            if older.name.startswith("step-") and older != place:
                shutil.rmtree(older, ignore_errors=True)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state as (a tree like `like`, counters); None where there is none.

        Raises CheckpointError where it is damaged or of another training.
        """
        found = sorted(p for p in self._folder.glob("step-*") if p.suffix != _PARTIAL)
        if not found:
            return None
        place = found[-1]
        leaves, tree = jax.tree.flatten(like)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            str(i): jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
            for i, a in enumerate(leaves)
        }
        act = "it is damaged or of another training: remove it to start anew"
        with naming_damage(f"{place} can't be read", act):
            counters = json.loads((place / _COUNTERS).read_text(encoding="utf-8"))
            with orbax_arrays.reading(place / _ARRAYS) as reader:
                named = reader.read(wanted)
            arrays = [named[str(i)] for i in range(len(leaves))]
            if [a.shape for a in arrays] != [a.shape for a in leaves]:
                raise ValueError("its arrays have other shapes")
        return jax.tree.unflatten(tree, arrays), counters
