"""How a section of the configuration documents and checks its fields. Read next: `config.py`."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

A_LIST = "\"('yes','no')\" on the command line, or the flag repeated"  # how to give texts
MOST = 2**31 - 1  # counts travel to the device as int32
_PREFIXES = {"SamplingParams": "sampling.", "RunConfig": ""}  # of a field; else a section's name


def doc(default: Any, text: str) -> Any:
    """A field with its default and what it is."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"doc": text})
    return dataclasses.field(default=default, metadata={"doc": text})


def check(section: object, name: str, allowed: bool, expected: str) -> None:
    """Raises ValueError, naming the field as flags do, value and what is expected, unless
    `allowed`.
    """
    if not allowed:
        kind = type(section).__name__
        prefix = _PREFIXES.get(kind, f"{kind.removesuffix('Section').lower()}.")
        value = getattr(section, name)
        raise ValueError(f"{prefix}{name}={value!r} is not allowed: want {expected}")


def check_types(section: object) -> None:
    """Each field against the type of its default; None passes where it is the default."""
    for field in dataclasses.fields(section):
        value, default = getattr(section, field.name), field.default
        if isinstance(default, bool):
            check(section, field.name, isinstance(value, bool), "true or false")
        elif isinstance(default, str):
            check(section, field.name, isinstance(value, str), "a text")
        elif isinstance(default, float):
            check(section, field.name, is_number(value, (int, float)), "a number")
        elif isinstance(default, int) or default is None:
            good = is_number(value, int) or (value is None and default is None)
            optional = " or none" if default is None else ""
            check(section, field.name, good, f"a whole number{optional}")


def listed(section: object, name: str, kind: type = str) -> None:
    """Makes a field a tuple of texts or whole numbers, which flags give with commas between them.

    Raises ValueError on anything else.
    """
    value = getattr(section, name)
    items = value if isinstance(value, (list, tuple)) else [value]
    pieces = [piece.strip() for item in items for piece in str(item).split(",")]
    good = all(isinstance(item, (str, kind)) for item in items)
    good &= kind is str or all(piece.isdecimal() for piece in pieces if piece)
    wanted = "a list of names" if kind is str else "a list of whole numbers"
    check(section, name, good, wanted)
    object.__setattr__(section, name, tuple(map(kind, filter(None, pieces))))


def variables(section: object, name: str, *, taken: Sequence[str]) -> None:
    """Makes a field a dict of names, none of those taken, with values as JSON has them.

    Raises ValueError on anything else.
    """
    value = getattr(section, name)
    check(section, name, isinstance(value, Mapping), 'an object such as {"name": value}')
    named = all(isinstance(key, str) and key.isidentifier() for key in value)
    check(section, name, named, "names of variables, with their values")
    free = not any(key in taken for key in value)
    check(section, name, free, f"other names than {', '.join(taken)}, which rows give")
    try:
        plain = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError):
        plain = None
    check(section, name, plain is not None, "values that JSON has")
    object.__setattr__(section, name, plain)


def is_number(value: object, types: type | tuple) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def refuse_unknown(names: Iterable[str], known: Sequence[str], *, where: str) -> None:
    """Raises ValueError for the first name that isn't known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown field {name!r}{hint} (known: {', '.join(known)})")


def from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A section from a mapping. Raises ValueError on an unknown name or an impossible value."""
    refuse_unknown(values, [field.name for field in dataclasses.fields(cls)], where=where)
    return cls(**values)
