"""How right an answer is, where `job.answer` names the column that knows it.

A result says by its own fields what it is: a label, a best choice, a ranking or a text. Grades are
shares from 0 to 1; the summary gives their mean with its interval. Read next: `framing.py`, which
writes the grade into the output row.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

_Z = 1.959964  # of a two-sided interval of 95 %


def grade(result: Mapping[str, Any], answer: Any) -> float:
    """1 for right, 0 for wrong, or the share of right fields.

    Args:
      result: an output row of any mode without error.
      answer: the label, the index of the best candidate or choice, the text, or an object whose
        fields the generated JSON shall have.
    """
    if "label" in result:
        return float(result["label"] == str(answer))
    if "ranking" in result:
        return float(str(result["ranking"][0]) == str(answer))
    if "best" in result:
        return float(str(result["best"]) == str(answer))
    if isinstance(answer, Mapping):
        return _share_of_fields(result.get("text", ""), answer)
    return float(result.get("text", "").strip() == str(answer).strip())


def interval(grades: int, mean: float) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of so many grades (Wilson 1927)."""
    if not grades:
        return 0.0, 1.0
    square = _Z * _Z / grades
    middle = (mean + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(mean * (1 - mean) / grades + square / 4 / grades)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share_of_fields(text: str, answer: Mapping[str, Any]) -> float:
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    if not isinstance(found, dict) or not answer:
        return 0.0
    return sum(found.get(name) == value for name, value in answer.items()) / len(answer)
