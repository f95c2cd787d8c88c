"""Sampling parameters on their way to the device: one int32 matrix for all rows.

`SampleSpec` says which features a program must have (it is static: one compiled program per spec),
`pack` writes the rows' parameters into the columns that the spec needs (floats as their bits),
`unpack` reads them back on the device. A greedy program therefore carries nothing but stop ids.
What the parameters do is in `sampling.py`; their meaning for a user and their validation are in
`config.SamplingParams`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.config import SamplingParams

_NO_ID = -1  # fills the unused places of an id list


def _padded(count: int) -> int:
    """The smallest power of two >= count (0 for 0): few widths mean few compiled programs."""
    return 1 << (count - 1).bit_length() if count else 0


def _stop_ids(params: SamplingParams, eos_ids: Sequence[int]) -> list[int]:
    """The ids that end this row, each once: its own, and the model's unless it ignores them."""
    own = [int(i) for i in params.stop_token_ids]
    return list(dict.fromkeys(own if params.ignore_eos else [*own, *map(int, eos_ids)]))


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """The features that a sampling program has; the default is greedy and nothing else.

    Fields: `stochastic` (some row has a temperature), `truncate` (some such row has top-k, top-p or
    min-p), `penalties`, `bias` (places for biased ids in a row), `stop_ids` (places for stop and
    end-of-sequence ids in a row), `min_tokens`, `logprobs` (-1: none; n: of the token itself and of
    at least n alternatives). `bias`, `stop_ids` and `logprobs` are 0 or powers of two. `text`:
    tokens of each row that the device remembers for speculation; 0: none. `drafted`: a second model
    proposes. `guided`: words of a mask of the ids that a row may get (a bit each; `of` knows no
    vocabulary and gives 1 where the row has a mask); 0: none. Decode blocks have no such rows.
    """

    stochastic: bool = False
    truncate: bool = False
    penalties: bool = False
    bias: int = 0
    stop_ids: int = 0
    min_tokens: bool = False
    logprobs: int = -1
    text: int = 0
    drafted: bool = False
    guided: int = 0

    @classmethod
    def of(cls, params: SamplingParams, eos_ids: Sequence[int]) -> SampleSpec:
        """The least spec that serves one row. `eos_ids`: the model's end-of-sequence ids."""
        stochastic = params.temperature > 0
        truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return cls(
            stochastic=stochastic,
            truncate=stochastic and truncated,
            penalties=penalties != (1, 0, 0),
            bias=_padded(len(params.logit_bias)),
            stop_ids=_padded(len(_stop_ids(params, eos_ids))),
            min_tokens=params.min_tokens > 0,
            logprobs=-1 if params.logprobs is None else _padded(params.logprobs),
            guided=int(bool(params.guided)),
        )

    def union(self, other: SampleSpec) -> SampleSpec:
        """The least spec that serves the rows of both."""
        fields = (field.name for field in dataclasses.fields(self))
        return SampleSpec(**{f: max(getattr(self, f), getattr(other, f)) for f in fields})

    def _columns(self) -> list[tuple[str, int, type]]:
        """The packed row from left to right: (RowParams field, columns, dtype)."""
        columns: list[tuple[str, int, type]] = []
        if self.stochastic:
            columns += [("seed", 2, np.uint32), ("temperature", 1, np.float32)]
        if self.truncate:
            columns += [("top_k", 1, np.int32), ("top_p", 1, np.float32), ("min_p", 1, np.float32)]
        if self.penalties:
            columns += [(f, 1, np.float32) for f in ("repetition", "presence", "frequency")]
        if self.min_tokens:
            columns.append(("min_tokens", 1, np.int32))
        if self.bias:
            columns += [("bias_ids", self.bias, np.int32), ("bias_values", self.bias, np.float32)]
        if self.stop_ids:
            columns.append(("stop_ids", self.stop_ids, np.int32))
        return columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """The rows' parameters on the device; a field that the spec doesn't need is None.

    `seed` u32[B, 2] (high and low half), `temperature` f32[B] (0: greedy), `top_k` i32[B] (0: off),
    `top_p` f32[B] (1: off), `min_p` f32[B] (0: off), `repetition`, `presence`, `frequency` f32[B],
    `min_tokens` i32[B], `bias_ids` i32[B, n] with `bias_values` f32[B, n], `stop_ids` i32[B, n];
    unused ids are -1.
    """

    seed: jax.Array | None = None
    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    repetition: jax.Array | None = None
    presence: jax.Array | None = None
    frequency: jax.Array | None = None
    min_tokens: jax.Array | None = None
    bias_ids: jax.Array | None = None
    bias_values: jax.Array | None = None
    stop_ids: jax.Array | None = None


def width(spec: SampleSpec) -> int:
    """Columns of a packed row."""
    return sum(columns for _, columns, _ in spec._columns())


def pack(
    rows: Sequence[SamplingParams | None],
    spec: SampleSpec,
    *,
    eos_ids: Sequence[int],
    seeds: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """int32[B, width(spec)]: the parameters of B rows for the device.

    None stands for an idle row: greedy, without stop ids. `seeds` are the seeds in effect, one a
    row, taken modulo 2**64 (`SamplingParams.seed` isn't read: who derives a seed where it is None
    decides here). Raises ValueError where a row needs what the spec lacks, or where rows and seeds
    differ in number.
    """
    if len(seeds) != len(rows):
        raise ValueError(f"pack got {len(rows)} rows but {len(seeds)} seeds: pass one seed a row")
    packed = np.zeros((len(rows), width(spec)), np.int32)
    for place, (params, seed) in enumerate(zip(rows, seeds, strict=True)):
        if params is not None and (need := SampleSpec.of(params, eos_ids)).union(spec) != spec:
            raise ValueError(
                f"row {place} needs {need}, but the program has {spec}: "
                "pack with the union of all rows' specs"
            )
        values = _row_values(params, eos_ids=eos_ids, seed=int(seed))
        start = 0
        for name, columns, dtype in spec._columns():
            cell = np.full(columns, _NO_ID if name.endswith("_ids") else 0, dtype)
            cell[: len(values[name])] = values[name]
            packed[place, start : start + columns] = cell.view(np.int32)
            start += columns
    return packed


def _row_values(
    params: SamplingParams | None, *, eos_ids: Sequence[int], seed: int
) -> dict[str, list]:
    """One row's values by RowParams field."""
    if params is None:
        params, eos_ids = SamplingParams(), ()
    bias = {int(i): float(value) for i, value in params.logit_bias.items()}
    return {
        "seed": [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF],
        "temperature": [params.temperature],
        "top_k": [max(params.top_k, 0)],
        "top_p": [params.top_p],
        "min_p": [params.min_p],
        "repetition": [params.repetition_penalty],
        "presence": [params.presence_penalty],
        "frequency": [params.frequency_penalty],
        "min_tokens": [params.min_tokens],
        "bias_ids": list(bias.keys()),
        "bias_values": list(bias.values()),
        "stop_ids": _stop_ids(params, eos_ids),
    }


def unpack(packed: jax.Array, spec: SampleSpec) -> RowParams:
    """The parameters out of i32[B, width(spec)]; free inside jit (slices and bitcasts).

    Raises ValueError where the matrix wasn't packed for this spec.
    """
    if packed.shape[-1] != width(spec):
        raise ValueError(
            f"packed rows have {packed.shape[-1]} columns but {spec} takes {width(spec)}: "
            "pack and unpack with one spec"
        )
    fields, start = {}, 0
    for name, columns, dtype in spec._columns():
        cell = packed[:, start : start + columns]
        if columns == 1 and not name.startswith(("bias", "stop")):
            cell = cell[:, 0]
        fields[name] = jax.lax.bitcast_convert_type(cell, jnp.dtype(dtype))
        start += columns
    return RowParams(**fields)
