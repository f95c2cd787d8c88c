"""Trees of arrays in a folder, by Orbax: written whole, read whole or in part.

Orbax is imported when a folder is read or written: it takes 0.4 s and 60 MiB, which those who load
other files don't need (2026-11-28). What the arrays mean is `orbax_store.py` and `train_state.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

_CHUNK_BYTES = 1 << 20  # of an array; whoever needs a part reads the chunks that it lies in


def write(folder: Path, tree: Any) -> None:
    """Writes nested dicts of arrays to a new folder."""
    import orbax.checkpoint as ocp

    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunked))


class Reader:
    """Of one folder; `reading` makes it."""

    def __init__(self, folder: Path, checkpointer: Any):
        self._folder, self._checkpointer = folder, checkpointer

    def table(self) -> Any:
        """The tree with shapes and dtypes in place of arrays."""
        return self._checkpointer.metadata(self._folder).item_metadata.tree

    def read(self, abstract: Any, *, part: bool = False) -> Any:
        """The arrays of a tree of `jax.ShapeDtypeStruct` with shardings, each on its devices; where
        the tree is only `part` of what is stored, the rest is left.
        """
        import orbax.checkpoint as ocp

        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(
            item=abstract, restore_args=restore_args, partial_restore=part
        )
        return self._checkpointer.restore(self._folder, args=args)


@contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """Opens a folder that `write` made. What Orbax raises on a damaged one is of many types."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        yield Reader(folder, checkpointer)
