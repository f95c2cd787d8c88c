"""JSON from files, as deep as what reads it may go: much of that calls itself for each level."""

import itertools
import json
from typing import Any

_DEEPEST = 128  # objects and lists in each other


def parse_json(text: str) -> Any:
    """The value. Raises ValueError on what is no JSON, or is nested more deeply than that."""
    deep = f"more than {_DEEPEST} objects and lists are nested in each other"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(deep) from error
    if text.count("{") + text.count("[") > _DEEPEST and _is_deep(value):
        raise ValueError(deep)
    return value


def _is_deep(value: Any) -> bool:
    level = [[value]]
    for _ in range(1 + _DEEPEST):
        inner = itertools.chain(*(one.values() if isinstance(one, dict) else one for one in level))
        level = [one for one in inner if isinstance(one, (dict, list))]
    return bool(level)
