"""How right an answer is, where `job.answer` names the column that knows it.

A result says by its own fields what it is: a label, a best choice, a ranking or a text. Grades are
shares from 0 to 1; the summary gives their mean with its interval. Read next: `framing.py`, which
writes the grade into the output row.
"""

import math
from collections.abc import Mapping
from typing import Any

from lepton_jax.jobs.files.nested_json import parse_json

_Z = 1.959964  # of a two-sided interval of 95 %


def grade(result: Mapping[str, Any], answer: Any) -> float | None:
    """1 for right, 0 for wrong, or the share of right fields; None where there is no answer, or
    nothing that could be right. Of several generated answers the first counts.

    Args:
      result: an output row of any mode without error.
      answer: the label, the index of the best candidate or choice, the text, or an object, or the
        JSON of one, whose fields the generated JSON shall have.
    """
    if answer is None:
        return None
    if "label" in result:
        return float(result["label"] == str(answer))
    if "ranking" in result:
        return float(str(result["ranking"][0]) == str(answer))
    if "best" in result:
        return float(str(result["best"]) == str(answer))
    if "choices" in result:
        result = result["choices"][0]
    if "text" not in result:
        return None
    fields = answer if isinstance(answer, Mapping) else _object(str(answer))
    if fields:
        return _share_of_fields(result["text"], fields)
    return float(result["text"].strip() == str(answer).strip())


def interval(grades: int, mean: float) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of so many grades (Wilson 1927)."""
    if not grades:
        return 0.0, 1.0
    square = _Z * _Z / grades
    middle = (mean + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(mean * (1 - mean) / grades + square / 4 / grades)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share_of_fields(text: str, answer: Mapping[str, Any]) -> float:
    found = _object(text)
    right = [name in found and found[name] == value for name, value in answer.items()]
    return sum(right) / len(right)


def _object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; else an empty one."""
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
