"""Messages to one prompt string: jinja2 chat templates, rendered as Hugging Face's
`apply_chat_template` does.

Templates come with model files and are untrusted code: they run in jinja2's immutable sandbox and
see plain JSON data only. Messages are checked before that, so a bad role or content is named by its
place instead of by a jinja traceback. Read `tokenizer.py` for where templates come from and how the
result becomes ids.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OLDER = {"developer": "system", "function": "tool"}  # for templates that know only these
# What a template's own code can raise, from raise_exception to adding a string to a list.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ChatTemplateError(ValueError):
    """Messages, tools or a template that don't fit: the message names which, and what would."""


def render(
    template: str,
    messages: Sequence[Mapping],
    *,
    tools: Sequence[Mapping] | None = None,
    **variables,
) -> str:
    """The prompt for `messages` ([{"role", "content"}, ...]); an answer is to follow unless told
    otherwise.

    `tools` are JSON schemas of functions; `variables` go to the template as they are (`bos_token`,
    `enable_thinking`, ...); `add_generation_prompt` is True by default. Raises `ChatTemplateError`.
    """
    checked = [_known_role(message, template) for message in _checked_messages(messages)]
    values = {"add_generation_prompt": True, "documents": None} | variables
    values |= {"messages": checked, "tools": _plain(tools, "tools")}
    try:
        return _compiled(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template's line {error.lineno} is not valid jinja: {error}"
        ) from error
    except _RENDER_ERRORS as error:
        roles = ", ".join(message["role"] for message in checked)
        raise ChatTemplateError(
            f"the chat template refuses the messages (roles: {roles}): {error}"
        ) from error


def variables_of(template: str) -> set[str]:
    """Names of what a template reads; of one that is no valid jinja, which `render` says, none."""
    try:
        return jinja2.meta.find_undeclared_variables(_environment().parse(template))
    except jinja2.TemplateSyntaxError:
        return set()


def _checked_messages(messages: Sequence[Mapping]) -> list[dict]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f'messages is a {type(messages).__name__}; give a list of {{"role", "content"}} objects'
        )
    if not messages:
        raise ChatTemplateError("messages is empty; give at least one")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: Mapping, place: str) -> dict:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(
            f'{place} is a {type(message).__name__}; give an object with "role" and "content"'
        )
    role = message.get("role")
    if role not in ROLES:
        raise ChatTemplateError(f"{place}.role is {role!r}; allowed: {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ChatTemplateError(f"{place}.content is missing; give a string")
    # Templates ask whether a key is there, and clients write null for what isn't.
    given = {name: value for name, value in message.items() if value is not None}
    rest = _plain({name: value for name, value in given.items() if name != "content"}, place)
    if "tool_calls" in rest:
        rest["tool_calls"] = _parsed_calls(rest["tool_calls"], f"{place}.tool_calls")
    return rest | {"content": _text_content(content, place)}


def _known_role(message: dict, template: str) -> dict:
    """A message whose role the template handles, as far as it has an older name: most templates
    leave out what they don't know.
    """
    role = message["role"]
    if role not in _OLDER or any(f"{quote}{role}{quote}" in template for quote in "'\""):
        return message
    return message | {"role": _OLDER[role]}


def _parsed_calls(calls: object, place: str) -> object:
    """Arguments as objects, which templates want; in OpenAI's form they are a text of JSON."""
    if not isinstance(calls, list):
        raise ChatTemplateError(f"{place} is a {type(calls).__name__}; give a list of calls")
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
            continue
        text = function["arguments"]
        try:
            function["arguments"] = json.loads(text or "{}")
        except (ValueError, RecursionError):
            function["arguments"] = None
        if not isinstance(function["arguments"], dict):
            raise ChatTemplateError(
                f"{place}[{number}].function.arguments is {text[:80]!r}; give a JSON object"
            )
    return calls


def _text_content(content: object, place: str) -> str:
    """Content as one string; text parts ([{"type": "text", "text"}]) are joined, other parts are
    refused.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ChatTemplateError(f"{place}.content is a {type(content).__name__}; give a string")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ChatTemplateError(
                f"{place}.content[{i}] is of type {kind!r}; only text parts are supported"
            )
    return "".join(part["text"] for part in content)


def _plain(value: object, place: str) -> object:
    """A copy of `value` made of JSON types only, so that a template gets no object with methods of
    its own.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"{place} is not plain JSON data: {error}") from error


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it is
    transparent.
    """

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, *, sort_keys=False) -> str:
    """jinja2's own filter escapes HTML, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
