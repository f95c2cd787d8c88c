"""The keywords of JSON schema (drafts 4 to 2020-12), and a search for words that are none.

The standard lets readers pass over words that they don't know: a misspelt `required` would be no
error, but a schema that asks for less. Which keywords can be followed is for `constraints.py` to
say.
"""

import difflib
from collections.abc import Mapping
from typing import Any

# By what their values hold.
_SCHEMAS = (
    "additionalItems additionalProperties contains contentSchema else if items not propertyNames"
    " then unevaluatedItems unevaluatedProperties"
).split()
_LISTS = "allOf anyOf items oneOf prefixItems".split()
_MAPS = "$defs definitions dependentSchemas patternProperties properties".split()
_PLAIN = (
    "$anchor $comment $dynamicAnchor $dynamicRef $id $ref $schema $vocabulary const"
    " contentEncoding contentMediaType default dependencies dependentRequired deprecated"
    " description enum examples exclusiveMaximum exclusiveMinimum format id maxContains maxItems"
    " maxLength maxProperties maximum minContains minItems minLength minProperties minimum"
    " multipleOf pattern readOnly required title type uniqueItems writeOnly"
).split()
KEYWORDS = frozenset([*_SCHEMAS, *_LISTS, *_MAPS, *_PLAIN])


def unknown_keyword(schema: Any, where: str = "json_schema") -> str:
    """What is wrong with the first word in a schema that is no keyword; "" where all are."""
    if not isinstance(schema, Mapping):
        return ""
    for name, value in schema.items():
        if name not in KEYWORDS:
            near = difflib.get_close_matches(str(name), sorted(KEYWORDS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            return f"{where}: {name!r} is no keyword of JSON schema: {hint}"
        for place, inner in _inner(name, value):
            found = unknown_keyword(inner, f"{where}.{place}")
            if found:
                return found
    return ""


def _inner(name: str, value: Any) -> list[tuple[str, Any]]:
    """The schemas that a keyword's value holds, and where."""
    if name in _LISTS and isinstance(value, list):
        return [(f"{name}[{number}]", inner) for number, inner in enumerate(value)]
    if name in _MAPS and isinstance(value, Mapping):
        return [(f"{name}.{key}", inner) for key, inner in value.items()]
    return [(name, value)] if name in _SCHEMAS else []
