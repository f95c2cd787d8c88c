"""Trees of arrays in a folder, by Orbax: written whole, read whole or in part.

Orbax is imported when a folder is read or written: it takes 0.4 s and 60 MiB, which those who load
other files don't need (2026-11-28). What the arrays mean is `orbax_store.py` and `train_state.py`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

# Whoever needs a part of an array reads the chunks that it lies in; tiny ones cost more than that.
_CHUNK_BYTES, _LEAST_CHUNK = 1 << 20, 1 << 16


def write(folder: Path, tree: Any) -> None:
    """Writes nested dicts of arrays to a new folder."""
    import orbax.checkpoint as ocp

    chunked = jax.tree.map(lambda array: ocp.SaveArgs(**_chunks(array)), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunked))


def _chunks(array: Any) -> dict[str, Any]:
    """How an array is stored: in chunks that each have one entry of the first of several dimensions
    of outputs (kv heads, experts), because cuts go along it; whole where it is small.

    Orbax takes the largest dimension to its next lower divisor until a chunk is small enough, which
    goes down to a single row of 128,257; it is whole then, too.
    """
    apart = (0,) if array.ndim > 2 else ()
    shape = [1 if dim in apart else size for dim, size in enumerate(array.shape)]
    while math.prod(shape) * array.dtype.itemsize > _CHUNK_BYTES:
        dim = shape.index(max(shape))
        shape[dim] = next(n for n in range(shape[dim] - 1, 0, -1) if array.shape[dim] % n == 0)
    small = math.prod(shape) * array.dtype.itemsize < _LEAST_CHUNK
    if small or array.ndim < 2 or array.nbytes <= _CHUNK_BYTES:
        return {}
    return dict(chunk_byte_size=_CHUNK_BYTES, shard_axes=apart)


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
