"""`Observed`: a weight that shows what it is multiplied with, while a program is traced.

Calibration puts it in a weight's place, runs the model inside one traced function, and returns what
the recorder was given. It is no stored type: no pytree, and no checkpoint holds it. Who uses it:
`lepton_jax/compression/calibrate.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax

from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.leaves import CompressedTensor, ParamSpec, dense_of, flat_of
from lepton_jax.tensors.matmul import matmul
from lepton_jax.tensors.ragged_dots import ragged_dot

Record = Callable[[jax.Array, jax.Array | None], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Observed(CompressedTensor):
    """A weight `[*out, I]`, an array or compressed, and who looks on.

    `record(x [M, I], group_sizes)` is called once for each product while it is traced, with
    tracers that must not leave the traced function but by its results. `group_sizes` is None, or
    int32 `[E]` where consecutive groups of rows meet their own weights.
    """

    weight: Any
    record: Record

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @classmethod
    def planned(cls, spec: ParamSpec, **static: Any) -> Self:
        raise ValueError(f"{spec.shape}: an observed weight is not stored, so it has no plan")

    def pieces(self, cut: Cut) -> list[Self]:
        raise ValueError(f"{self.shape}: an observed weight is not stored, so it has no pieces")

    def flat(self, keep: int = 0) -> Self:
        return Observed(flat_of(self.weight, keep), self.record)

    def matmul(self, x: jax.Array) -> jax.Array:
        self.record(x, None)
        return matmul(x, self.weight)

    def ragged_matmul(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        self.record(x, group_sizes)
        return ragged_dot(x, self.weight, group_sizes)

    def dense(self, dtype: Any) -> jax.Array:
        return dense_of(self.weight, dtype)

    def taken(self, ids: jax.Array) -> Self:
        raise TypeError("an observed weight is multiplied, not looked up")
