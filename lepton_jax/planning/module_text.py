"""XLA's printed module as data: computations, instructions, arrays and the memory they are in.

Only what `traffic.py` asks for is read: names, types with layouts, operands, called computations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|called_computations|branch_computations|"
    r"true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
MAIN_MEMORY, VECTOR_MEMORY = 0, 1  # a TPU's HBM and VMEM; others hold scalars and semaphores


@dataclasses.dataclass(frozen=True)
class Array:
    """`space` is the memory that it is in: MAIN_MEMORY, VECTOR_MEMORY or another."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    def bytes_in(self, space: int) -> int:
        """Its bytes where it is in that memory, else 0."""
        return self.nbytes if self.space == space else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `arrays` are those of its result, tuples taken apart."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def bytes_in(self, space: int) -> int:
        return sum(array.bytes_in(space) for array in self.arrays)

    @property
    def called(self) -> list[str]:
        """Computations that it runs, the condition of a loop left out."""
        return [name for group in _CALLED.findall(self.attributes) for name in _NAME.findall(group)]

    @property
    def condition(self) -> str | None:
        found = _CONDITION.search(self.attributes)
        return found[1] if found else None

    @property
    def known_trips(self) -> int | None:
        """How often a loop runs, where the compiler says so."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    def attribute(self, name: str) -> str:
        """The text between quotes after `name=`; "" where there is none."""
        found = re.search(rf'{name}="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation:
    """Instructions in the order in which they run."""

    def __init__(self, name: str, instructions: list[Instruction]):
        self.name, self.instructions = name, instructions
        self.by_name = {i.name: i for i in instructions}

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions) if i.is_root)

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def users(self, name: str) -> list[Instruction]:
        return self._users.get(name, [])

    def parameter(self, index: int) -> Instruction:
        return next(
            i for i in self.instructions if i.opcode == "parameter" and i.operands == (str(index),)
        )

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """Those of its operands that are instructions."""
        return (self.by_name[name] for name in instruction.operands if name in self.by_name)


class Module:
    """All computations of a module by name; `entry` is where it begins."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        name, lines = "", []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name, lines = header[2], []
                self.entry = name if header[1] else self.entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, lines)
            elif line.startswith("  ") and " = " in line:
                lines.append(_instruction(line))
        if not self.entry:
            raise ValueError("the compiled module's text has no ENTRY: its format has changed")


def _instruction(line: str) -> Instruction:
    head, _, rest = _COMMENT.sub("", line).strip().partition(" = ")
    is_root, name = head.startswith("ROOT "), head.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].strip().partition("(")
    begin = rest.index("(", end)
    close = _closing(rest, begin)
    inside = rest[begin + 1 : close]
    literal = opcode in ("parameter", "constant")
    operands = (inside,) if literal else tuple(_NAME.findall(inside))
    arrays = tuple(_arrays(rest[:end]))
    return Instruction(name, opcode, arrays, operands, rest[close + 1 :], is_root)


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n) for n in dims.split(",") if n)
        yield Array(dtype, sizes, int(space[1]) if space else MAIN_MEMORY)


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at `begin` closes."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[:100]!r}")


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)
    if found is None:
        raise ValueError(f"array type {dtype!r} of a compiled module is unknown")
    return int(found[0])
