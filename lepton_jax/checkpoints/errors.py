"""The one error of this room: a checkpoint that can't be found, fetched, read or written.

The message names the file, what is wrong with it, and what to do next.
"""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of an unknown kind, or doesn't fit its model."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or a device's memory is exhausted, which says nothing of a file."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
