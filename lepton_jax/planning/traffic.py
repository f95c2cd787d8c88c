"""What a compiled program moves: bytes through each memory, and collectives with their bytes.

XLA's own count (`cost_analysis`) takes prefetches twice, and gathers and updates in place at the
size of the whole array, so the scheduled module is read instead: what lies in vector memory costs
main memory nothing, a slice, gather or update costs its own size, loops count as often as they run.
Read next: `module_text.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from lepton_jax.planning.module_text import MAIN_MEMORY, Computation, Instruction, Module

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
}
_CALLS = {"call", "async-start", "call-start", "custom-call-start"}  # what other cores do too
_FREE_CALLS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "AssumeIndicesInBound"}
# Within a fusion these are computed for what is asked of them: a slice of a copy reads a slice.
_SAME = {
    "bitcast",
    "bitcast-convert",
    "reshape",
    "get-tuple-element",
    "copy",
    "convert",
    "transpose",
}
_TAKES = {"dynamic-slice", "slice", "gather"}
_PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that holds the new values


@dataclasses.dataclass
class Traffic:
    """Bytes read from and written to a memory; collectives and their bytes by kind."""

    read: float = 0.0
    written: float = 0.0
    collectives: Counter = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter = dataclasses.field(default_factory=Counter)

    @property
    def total(self) -> float:
        return self.read + self.written

    def add(self, other: Traffic, times: float = 1) -> None:
        self.read += times * other.read
        self.written += times * other.written
        for mine, theirs in (
            (self.collectives, other.collectives),
            (self.collective_bytes, other.collective_bytes),
        ):
            for kind, value in theirs.items():
                mine[kind] += times * value


def traffic(
    module: Module | str,
    *,
    steps: int = 1,
    partly: Mapping[int, float] | None = None,
    space: int = MAIN_MEMORY,
) -> Traffic:
    """Of one run of a module.

    Args:
      module: the scheduled one, or its text as XLA prints it.
      steps: how often a loop of the entry runs whose count isn't known; deeper ones run once.
      partly: sizes in bytes of arrays that a kernel reads in part, and what it reads of one as its
        operand: nothing of a cache, where the caller adds what is live; the experts that are
        visited.
      space: the memory whose bytes are counted.
    """
    module = Module(module) if isinstance(module, str) else module
    return _Reader(module, steps, partly or {}, space).entry()


class _Reader:
    def __init__(self, module: Module, steps: int, partly: Mapping[int, float], space: int):
        self.module, self.steps, self.partly, self.space = module, steps, partly, space
        self._known: dict[str, Traffic] = {}

    def entry(self) -> Traffic:
        return self._computation(self.module.entry)

    def _computation(self, name: str) -> Traffic:
        if name not in self._known:
            computation, found = self.module.computations[name], Traffic()
            for instruction in computation.instructions:
                self._add(found, computation, instruction)
            self._known[name] = found
        return self._known[name]

    def _add(self, found: Traffic, computation: Computation, step: Instruction) -> None:
        opcode = step.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            times = self._trips(computation, step)
            for name in (*step.called, step.condition):
                found.add(self._computation(name), times)
        elif opcode == "conditional":
            found.add(max(map(self._computation, step.called), key=lambda t: t.total))
        elif opcode in _CALLS and step.called:
            for name in step.called:
                found.add(self._computation(name))
        elif opcode in ("copy-start", "slice-start"):
            self._add_transfer(found, step)
        elif opcode != "custom-call" or step.attribute("custom_call_target") not in _FREE_CALLS:
            self._add_plain(found, computation, step)
            kind = opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                found.collectives[kind] += 1
                found.collective_bytes[kind] += sum(
                    array.nbytes for o in computation.operands(step) for array in o.arrays
                )

    def _add_transfer(self, found: Traffic, step: Instruction) -> None:
        """A copy shows (target, source, flag), a slice ((source), target, flag)."""
        first, second = step.arrays[:2]
        target, source = (first, second) if step.opcode == "copy-start" else (second, first)
        found.read += target.nbytes if source.bytes_in(self.space) else 0
        found.written += target.bytes_in(self.space)

    def _add_plain(self, found: Traffic, computation: Computation, step: Instruction) -> None:
        for place, operand in enumerate(step.operands):
            source = computation.by_name.get(operand)
            whole = source.bytes_in(self.space) if source is not None else 0
            if whole:
                found.read += min(whole, self._read(step, place, whole))
        found.written += self._written(computation, step)

    def _read(self, step: Instruction, place: int, whole: int) -> float:
        """Bytes that an instruction reads of its operand at `place`, which has `whole`."""
        if step.opcode in _TAKES and place == 0:
            return sum(array.nbytes for array in step.arrays)
        if step.opcode in _PUTS and place == 0:
            return 0
        if step.opcode == "custom-call":
            return self.partly.get(whole, whole)
        if step.opcode != "fusion":
            return whole
        inner = self.module.computations[step.called[0]]
        nbytes, comes_out = self._read_within(inner, inner.parameter(place), whole)
        return whole if comes_out else min(nbytes, whole)

    def _read_within(
        self, inner: Computation, value: Instruction, whole: int
    ) -> tuple[float, bool]:
        """Bytes of a value that a fused computation reads, and whether it gives it out as it is."""
        total, comes_out = 0, value.is_root
        for user in inner.users(value.name):
            passed_on = user.opcode in _SAME
            if user.opcode == "fusion":
                called = self.module.computations[user.called[0]]
                parameter = called.parameter(user.operands.index(value.name))
                nbytes, passed_on = self._read_within(called, parameter, whole)
                total += nbytes
            elif not passed_on:
                places = [i for i, name in enumerate(user.operands) if name == value.name]
                total += max(self._read(user, place, whole) for place in places)
            if passed_on:
                nbytes, further = self._read_within(inner, user, whole)
                total, comes_out = total + nbytes, comes_out or further
        return total, comes_out

    def _written(self, computation: Computation, step: Instruction) -> int:
        if step.opcode == "custom-call":
            return sum(a.bytes_in(self.space) for a in step.arrays if a.nbytes not in self.partly)
        if not step.bytes_in(self.space):
            return 0
        if step.opcode in _PUTS:
            return self._update_bytes(computation, step)
        if step.opcode != "fusion":
            return step.bytes_in(self.space)
        inner = self.module.computations[step.called[0]]
        root = inner.root
        results = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
        if len(results) != len(step.arrays):
            return step.bytes_in(self.space)
        total = 0
        for result, array in zip(results, step.arrays, strict=True):
            while result.opcode in ("bitcast", "reshape") and result.operands[0] in inner.by_name:
                result = inner.by_name[result.operands[0]]
            if array.bytes_in(self.space) and result.opcode in _PUTS:
                total += self._update_bytes(inner, result)
            elif array.bytes_in(self.space) and result.opcode == "fusion":
                total += self._written(inner, result) or array.bytes_in(self.space)
            else:
                total += array.bytes_in(self.space)
        return total

    @staticmethod
    def _update_bytes(computation: Computation, step: Instruction) -> int:
        update = computation.by_name[step.operands[_PUTS[step.opcode]]]
        return sum(array.nbytes for array in update.arrays)

    def _trips(self, computation: Computation, step: Instruction) -> int:
        if step.known_trips is not None:
            return step.known_trips
        condition = self.module.computations[step.condition]
        limit = _limit(condition)
        if limit is not None:
            return limit
        return self.steps if computation.name == self.module.entry else 1


def _limit(condition: Computation) -> int | None:
    """n of a condition `i < n` with a constant n, which counts from 0 up."""
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    for operand in condition.operands(root):
        if operand.opcode == "constant":
            return int(operand.operands[0])
    return None
