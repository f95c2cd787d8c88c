"""The models that a search needs: each is loaded once, and kept while there is room for it."""

import dataclasses
import gc
from collections.abc import Callable

import jax

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.load import load_compressed
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import CompressionSection, MeshSection, ModelSection, RunConfig
from lepton_jax.distributed.local import device_groups


@dataclasses.dataclass(frozen=True)
class _Wanted:
    model: ModelSection
    compression: CompressionSection
    mesh: MeshSection


class Shelf:
    """Loads models of configs."""

    def __init__(self, room: int, progress: Callable[[str, int, int, str], None]):
        """`room`: bytes that models which aren't asked for may take."""
        self._room, self._progress = room, progress
        self._held: list[tuple[_Wanted, Loaded]] = []  # the last asked for comes last

    def model(self, config: RunConfig) -> Loaded:
        """A config's model on its devices."""
        mesh = dataclasses.replace(config.mesh, data=1)
        return self._take(_Wanted(config.model, config.compression, mesh))

    def draft(self, config: RunConfig) -> Loaded:
        """The draft model of a config that speculates with one."""
        draft = draft_of(config)
        return self._take(_Wanted(draft.model, draft.compression, MeshSection()))

    def _take(self, wanted: _Wanted) -> Loaded:
        for place, (other, loaded) in enumerate(self._held):
            if other == wanted:
                self._held.append(self._held.pop(place))
                return loaded
        while self._held and sum(_nbytes(loaded) for _, loaded in self._held) > self._room:
            self._held.pop(0)
        gc.collect()

        def progress(done: int, total: int, path: str) -> None:
            self._progress(f"load {wanted.compression.preset}", done, total, path)

        recipe, (devices,) = Recipe.from_config(wanted.compression), device_groups(wanted.mesh)
        loaded = load_compressed(wanted.model, recipe, progress=progress, devices=devices)
        self._held.append((wanted, loaded))
        return loaded


def draft_of(config: RunConfig) -> RunConfig:
    """The config with its draft model as the model."""
    engine = config.engine
    model = dataclasses.replace(config.model, path=engine.draft_model or config.model.path)
    compression = CompressionSection(preset=engine.draft_preset)
    return dataclasses.replace(config, model=model, compression=compression)


def _nbytes(loaded: Loaded) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.leaves))
