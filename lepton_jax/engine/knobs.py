"""What may be set on a scheduler between beats, and the arithmetic of a block's length.

Plain Python. Who reads them: `scheduler.py`; who turns them: `lepton_jax/optimizer`.
"""

import dataclasses
from collections.abc import Sequence

from lepton_jax.engine.request import Row

# Steps that a beat's dispatch and prefill program cost: about one read of the weights.
_BEAT_COST = 1


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What may be set between beats, up to the values that the programs were compiled for.

    Attributes:
      decode_block: most steps of a block.
      prefill_chunk: most prompt tokens of a beat, padding to tiles included.
      live_rows: most rows that hold a slot; rows beyond a lowered value stay until they end.
      draft: most tokens that a step of a speculative block verifies; 0: no speculation.
      admit_together: free slots to wait for before rows are admitted, so that their prompts fill a
        program; fewer do where fewer rows wait.
      reserve_pages: pages to leave free at an admission besides those of the next blocks.
      beat_cost: steps of decode that a beat costs besides its own.
      longest_first: waiting rows with the highest limit are admitted first.
      prefill_beats: most beats between two blocks that one long prompt may fill alone, while more
        rows could be admitted.
    """

    decode_block: int
    prefill_chunk: int
    live_rows: int
    draft: int = 0
    admit_together: int = 1
    reserve_pages: int = 0
    beat_cost: float = _BEAT_COST
    longest_first: bool = False
    prefill_beats: int = 4


def longest_draft(running: Sequence[Row], most: int) -> int:
    """The draft policy by default: tokens to propose in the next block, 0 to `most`."""
    return most


def best_steps(remaining: Sequence[int], most: int, beat_cost: float = _BEAT_COST) -> int:
    """Steps of a block while requests wait for the slots of rows with `remaining` steps to go.

    The number that gives the most tokens for its time, a beat costing `beat_cost` steps besides;
    the larger of equals. Rows that end early in a longer block idle until its end; a shorter block
    pays for another beat. So one row never cuts a large batch's block, and all rows together do.
    """

    def rate(steps: int) -> float:
        return sum(min(steps, left) for left in remaining) / (steps + beat_cost)

    return max(range(min(most, max(remaining)), 0, -1), key=rate, default=0)
