"""One grammar for every method of compression: ordered regular expressions over parameter paths.

The first rule whose pattern matches the whole path wins; a path that no rule matches is left as it
is; a rule that no path uses is an error, because it is nearly always a misspelt path. Rules speak
of the weights of matrix products only (`weights_of`). How they are written as text is `recipe.py`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from lepton_jax.tensors import ParamSpec

T = TypeVar("T")


class Rule(NamedTuple, Generic[T]):
    """`action` for the paths that `pattern` matches as a whole."""

    pattern: str
    action: T


def weights_of(specs: Mapping[str, ParamSpec]) -> list[str]:
    """Paths that rules may name: weights of products but for the routers of experts, which cost
    nothing and decide much. Norm scales and biases are no weights of products.
    """
    return [path for path, s in specs.items() if s.inputs and not path.endswith(".router")]


def assign(rules: Iterable[Rule[T]], paths: Iterable[str]) -> dict[str, T]:
    """The action of each path that has one. Raises ValueError on a bad pattern or a rule that
    nothing uses.
    """
    compiled = [(rule, _compile(rule.pattern)) for rule in rules]
    paths = list(paths)
    unused = dict(enumerate(rule.pattern for rule, _ in compiled))
    actions = {}
    for path in paths:
        for number, (rule, pattern) in enumerate(compiled):
            if pattern.fullmatch(path):
                actions[path] = rule.action
                unused.pop(number, None)
                break
    if unused:
        raise ValueError(
            "compression rules that match no parameter (or only ones that an earlier rule took): "
            f"{list(unused.values())}; paths look like {paths[:6]}"
        )
    return actions


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"compression rule {pattern!r} is no regular expression: {error}"
        ) from None
