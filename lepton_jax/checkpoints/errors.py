"""The one error of this room: a checkpoint that can't be found, fetched, read or written.

The message names the file, what is wrong with it, and what to do next.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of an unknown kind, or doesn't fit its model."""


@contextmanager
def naming_damage(fault: str, act: str) -> Iterator[None]:
    """What reading stored arrays raises becomes a CheckpointError with the fault, the cause and
    the next act; but not want of memory, which is no damage.
    """
    try:
        yield
    except Exception as error:  # Orbax raises errors of several storage layers
        if is_out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(f"{fault}: {cause}; {act}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or a device's memory is exhausted, which says nothing of a file."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
