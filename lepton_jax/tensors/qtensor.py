"""`QTensor`: a weight quantized to int8, packed int4 or float8, with its matrix product.

`weight = values * scale (+ offset)`; a scale belongs to an output channel or to a group of its
inputs. How arrays become QTensors is `lepton_jax/compression/quantize.py`; the products of plain
arrays are `dots.py`.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from lepton_jax.tensors import dots
from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.decompress import by_outputs, in_order
from lepton_jax.tensors.leaves import CompressedTensor, ParamSpec, flattened, register_leaf
from lepton_jax.tensors.ragged_dots_tpu import LANES, Streamed

_STORED = {"int8": jnp.int8, "int4": jnp.uint8, "float8_e4m3fn": jnp.float8_e4m3fn}


@register_leaf("values", "scale", "offset", "act_scale")
@dataclasses.dataclass(frozen=True)
class QTensor(CompressedTensor):
    """A quantized weight `[*out, I]` of X groups of inputs.

    Attributes:
      values: int8 `[*out, I]` in -127..127, float8_e4m3fn `[*out, I]`, or uint8 `[*out, I/2]`: two
        4-bit values of -8..7, each stored plus 8. Packing stays within a group: byte j of a group
        has its value j in the low half and value j + group/2 in the high half.
      scale: float32 `[*out]`, or bfloat16 `[*out, X]`.
      act_bits: of the activations it is multiplied with. 16: as good as float (weight-only
        quantization). 8: quantized while the program runs (W8A8), int8 or float8 like the weight.
      offset: bfloat16 `[*out, X]` added to values * scale (asymmetric quantization), or None.
      act_scale: float32 `[]`, the activations' scale where it was calibrated (static W8A8), or
        None: from each row's largest magnitude.
    """

    values: Any
    scale: Any
    act_bits: int = 16
    offset: Any = None
    act_scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        *outs, stored = self.values.shape
        return (*outs, 2 * stored if self.packed else stored)

    @property
    def packed(self) -> bool:
        return self.values.dtype == jnp.uint8

    @property
    def grouped(self) -> bool:
        return len(self.scale.shape) >= len(self.values.shape)

    @classmethod
    def planned(
        cls,
        spec: ParamSpec,
        *,
        values: str = "int8",
        group: int = 0,
        asymmetric: bool = False,
        static_activations: bool = False,
        act_bits: int = 16,
    ) -> Self:
        """The leaf of ParamSpecs. `group` is the inputs of a scale; 0: one scale per output."""
        if values not in _STORED:
            raise ValueError(f"values={values!r}: allowed are {', '.join(_STORED)}")
        if act_bits not in (8, 16):
            raise ValueError(f"act_bits={act_bits}: allowed are 8 (W8A8) and 16 (weight-only)")
        *outs, inputs = spec.shape
        packed = values == "int4"
        if group and (inputs % group or (packed and group % 2)):
            raise ValueError(f"group={group} does not divide the {inputs} inputs evenly")
        if (packed or asymmetric) and not group:
            raise ValueError(f"values={values} asymmetric={asymmetric}: want a group")
        if act_bits == 8 and group:
            raise ValueError("act_bits=8 needs one scale per output: group must be 0")
        if static_activations and act_bits != 8:
            raise ValueError("static_activations need act_bits=8")

        def part(shape, dtype):
            axes = (*spec.axes[:-1], "groups")[: len(shape)]
            return ParamSpec(tuple(shape), dtype, axes)

        kept = ParamSpec(
            (*outs, inputs // 2 if packed else inputs), _STORED[values], spec.axes, spec.inputs
        )
        per_group = part((*outs, inputs // group), jnp.bfloat16) if group else None
        return cls(
            values=kept,
            scale=per_group or part(outs, jnp.float32),
            act_bits=act_bits,
            offset=per_group if asymmetric else None,
            act_scale=ParamSpec((), jnp.float32, ()) if static_activations else None,
        )

    def static(self) -> dict[str, Any]:
        """The arguments of `planned`."""
        names = {jnp.dtype(dtype): name for name, dtype in _STORED.items()}
        return dict(
            values=names[jnp.dtype(self.values.dtype)],
            group=self.group,
            asymmetric=self.offset is not None,
            static_activations=self.act_scale is not None,
            act_bits=self.act_bits,
        )

    def pieces(self, cut: Cut) -> list[Self]:
        """Where parts of the inputs would cut through groups, these get smaller."""
        whole = self._with_group(self._group_within(cut)) if self._cuts_inputs(cut) else self
        parts = {}
        for name, how in whole.cuts(cut).items():
            array = getattr(whole, name)
            parts[name] = [None] * cut.parts if array is None else how.split(array)
        return [
            dataclasses.replace(whole, **{name: arrays[i] for name, arrays in parts.items()})
            for i in range(cut.parts)
        ]

    def cuts(self, cut: Cut) -> dict[str, Cut] | None:
        if not self._cuts_inputs(cut):
            return dict(values=cut, scale=cut, offset=cut)
        if self.grouped and cut.share % self.group:
            return None
        groups = cut.of(cut.share // self.group) if self.grouped else cut
        values = cut.of(cut.share // 2) if self.packed else cut
        return dict(values=values, scale=groups, offset=groups)

    def _cuts_inputs(self, cut: Cut) -> bool:
        return cut.dim == len(self.values.shape) - 1

    def planned_piece(self, part: ParamSpec, cut: Cut) -> Self:
        group = self._group_within(cut) if self._cuts_inputs(cut) else self.group
        return self.planned(part, **self.static() | dict(group=group))

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0: all."""
        return self.shape[-1] // self.scale.shape[-1] if self.grouped else 0

    def _group_within(self, cut: Cut) -> int:
        """The largest group of inputs that no cut goes through."""
        group = math.gcd(self.group, cut.share) if self.grouped else 0
        if self.packed and group % 2:
            raise ValueError(f"groups of {self.group} packed inputs, {cut.share} in a part")
        return group

    def _with_group(self, group: int) -> Self:
        """The same weight with a scale for every `group` inputs, which divides today's."""
        if group == self.group:
            return self
        times = self.group // group
        values = self.values
        if self.packed:
            steps = _unpack(values, self.scale.shape[-1])
            values = pack_int4(steps, self.scale.shape[-1] * times)
        offset = self.offset if self.offset is None else jnp.repeat(self.offset, times, axis=-1)
        scale = jnp.repeat(self.scale, times, axis=-1)
        return dataclasses.replace(self, values=values, scale=scale, offset=offset)

    def flat(self, keep: int = 0) -> Self:
        """Scales by group become `[A, L, X]`, L the last of several dimensions of outputs: a TPU
        has them in an order in which `[O, X]` would be a copy, held as long as a decode block
        (100 MiB of Llama-3.1-8B in int4).
        """
        by_group = 1 if keep or len(self.values.shape) == 2 else 2
        return dataclasses.replace(
            self,
            values=flattened(self.values, keep, 1),
            scale=flattened(self.scale, keep, by_group if self.grouped else 0),
            offset=flattened(self.offset, keep, by_group),
        )

    def matmul(self, x: jax.Array) -> jax.Array:
        if self.grouped:
            return self._grouped_matmul(x)
        if self.values.dtype == jnp.float8_e4m3fn:
            return self._float8_matmul(x)
        if self.act_scale is not None:
            return dots.static_int8_dot(x, self.values, self.act_scale) * self.scale
        product = dots.int8_dot if self.act_bits == 8 else dots.precise_int8_dot
        return product(x, self.values) * self.scale

    def dense(self, dtype: Any) -> jax.Array:
        values = self.values
        if self.packed:
            values = _unpack(values, self.scale.shape[-1])
        wide = values.astype(jnp.float32)
        if not self.grouped:
            return (wide * self.scale[..., None]).astype(dtype)
        parts = wide.reshape(*self.scale.shape, -1) * self.scale[..., None].astype(jnp.float32)
        if self.offset is not None:
            parts = parts + self.offset[..., None].astype(jnp.float32)
        return parts.reshape(self.shape).astype(dtype)

    def taken(self, ids: jax.Array) -> Self:
        return jax.tree.map(
            lambda array: jnp.take(array, ids, axis=0, mode="clip") if array.ndim else array, self
        )

    @property
    def streams(self) -> bool:
        return not self.grouped or self.values.shape[-1] % LANES == 0

    def streamed(self, x: jax.Array) -> Streamed:
        """int8 and float8 steps of activations are exact in bfloat16."""
        if self.grouped:
            if self.packed:
                halves = x.reshape(x.shape[0], self.scale.shape[-1], 2, -1)
                x = jnp.swapaxes(halves, 1, 2).reshape(x.shape)
            return Streamed(x, self.values, group_scale=self.scale, offset=self.offset)
        row_scale = None
        if self.act_scale is not None:
            x, row_scale = dots.int8_steps(x, self.act_scale), self.act_scale
        elif self.act_bits == 8:
            float8 = self.values.dtype == jnp.float8_e4m3fn
            x, row_scale = (dots.float8_rows if float8 else dots.quantize_rows)(x)
        return Streamed(x, self.values, self.scale, row_scale)

    def _float8_matmul(self, x):
        if self.act_bits == 8:
            x, row_scale = dots.float8_rows(x)
            return dots.float8_dot(x, self.values) * row_scale * self.scale
        return dots.upcast_dot(x, self.values) * self.scale

    def _grouped_matmul(self, x):
        x, leaf = in_order(x, self)
        return jax.lax.platform_dependent(
            x,
            leaf,
            cpu=functools.partial(by_outputs, product=_exact_dot),
            tpu=functools.partial(by_outputs, product=_widened_dot),
            default=_widened_dot,
        )


def _exact_dot(x: jax.Array, leaf: QTensor) -> jax.Array:
    """In the activations' dtype. In bfloat16 float32 ones would cost 1.3e-4 nats a token of 1.3e-3
    (SmolLM2, int8 in groups of 32) and on a CPU without bfloat16 dots no less time: [3072, 576] at
    1 / 8 / 32 / 256 rows 0.71 / 1.00 / 1.81 / 13.1 ms, in float32 0.28 / 1.17 / 1.72 / 7.9 (2-core
    AVX2 CPU, jax 0.12.0.1, 2026-11-28).
    """
    return dots.float_dot(x, leaf.dense(x.dtype))


def _widened_dot(x: jax.Array, leaf: QTensor) -> jax.Array:
    dtype = x.dtype if x.dtype != jnp.float32 else jnp.bfloat16
    return dots.dot(x.astype(dtype), leaf.dense(dtype), jnp.float32)


def pack_int4(values: jax.Array, groups: int) -> jax.Array:
    """int8 values of -8..7 `[*out, I]` as QTensor stores them: uint8 `[*out, I/2]`."""
    *outs, inputs = values.shape
    halves = (values + 8).astype(jnp.uint8).reshape(*outs, groups, 2, inputs // groups // 2)
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*outs, inputs // 2)


def _unpack(stored: jax.Array, groups: int) -> jax.Array:
    *outs, half = stored.shape
    parts = stored.reshape(*outs, groups, half // groups)
    both = jnp.concatenate([parts & 15, parts >> 4], axis=-1).astype(jnp.int8) - 8
    return both.reshape(*outs, 2 * half)
