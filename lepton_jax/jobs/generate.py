"""The mode generate: prompts become answers.

    {"id": "a", "prompt": "Once upon a time", "sampling": {"max_tokens": 64}}
    {"id": "b", "messages": [{"role": "user", "content": "Hello"}]}
    {"id": "c", "prompt_tokens": [1, 338, 263]}

Beside messages there may be "tools", a list of JSON schemas of functions, for the chat template; a
call of one is text like any other. With `job.template` a row's prompt is the template with the
row's columns in it, and "sampling" is all that is read besides.

An output row is {"id", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"},
with "logprobs" where asked: [{"logprob", "top": [[id, logprob], ...]} for each token]. With n > 1
it is {"id", "choices": [{"text", "token_ids", "finish_reason"}, ...], "prompt_tokens",
"completion_tokens"}, the last of all choices together. Read next: `modes.py`, `session.py`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.config import SamplingParams, from_mapping, refuse_unknown
from lepton_jax.jobs.files.source import template_parts
from lepton_jax.jobs.modes import IndependentRows, Progress
from lepton_jax.jobs.rows import ASIDE, Prompt, RowError, need_messages, shown
from lepton_jax.jobs.session import (
    Choice,
    Completion,
    Engine,
    Session,
    encode,
    expand,
    grammar_of,
    with_stop_ids,
)
from lepton_jax.text.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "messages", "prompt_tokens")


@dataclasses.dataclass(frozen=True)
class PromptWork:
    """`prompt` is a text, a list of messages, or a list of token ids; `tools` go with messages."""

    prompt: Prompt
    sampling: SamplingParams
    tools: list[dict] | None = None


class GenerateMode(IndependentRows):
    """Rows with a prompt each, or with what `template` makes one of; `sampling` is what a row's own
    leaves open.
    """

    def __init__(self, sampling: SamplingParams, template: str = ""):
        """Raises ValueError where what they prescribe can't be followed."""
        grammar_of(sampling)
        self._sampling, self._template = sampling, template_parts(template)
        columns = dict.fromkeys(name for _, name in self._template if name)
        self.fields = (*(columns if template else (*PROMPT_FIELDS, "tools")), "sampling")

    def parse(self, values: Mapping[str, Any]) -> PromptWork:
        """Raises RowError (invalid_row, invalid_sampling)."""
        sampling = row_sampling(values, self._sampling)
        grammar_of(sampling)
        if self._template:
            return PromptWork(_filled_in(self._template, values), sampling)
        return PromptWork(_prompt(values), sampling, _tools(values))

    def requests(self, work: PromptWork, tokenizer: Tokenizer) -> list[tuple[int, SamplingParams]]:
        """Raises RowError (invalid_prompt)."""
        count = len(encode(tokenizer, work.prompt, work.tools))
        asked = with_stop_ids(tokenizer, work.sampling)
        return [(count, params) for params in expand(asked)]

    def open(self, engine: Engine, tokenizer: Tokenizer) -> "GenerateSession":
        return GenerateSession(Session(engine, tokenizer))


class GenerateSession:
    """A `ModeSession` over a `Session`."""

    def __init__(self, session: Session):
        self._session = session

    @property
    def has_work(self) -> bool:
        return self._session.has_work

    def __len__(self) -> int:
        return len(self._session)

    def add(self, key: str, work: PromptWork) -> None:
        self._session.add(key, work.prompt, work.sampling, tools=work.tools)

    def step(self) -> list[Progress]:
        return [
            Progress(
                delta.key,
                delta.new_tokens,
                answer(delta.completion) if delta.completion else None,
            )
            for delta in self._session.step()
        ]

    def drop(self, key: str) -> None:
        self._session.drop(key)

    def close(self) -> None:
        self._session.close()


def answer(completion: Completion) -> dict:
    """The output row, less its id, of an answered prompt; an error where the model failed."""
    if any(choice.finish_reason == "error" for choice in completion.choices):
        message = "the model gave logits that are not finite: try another dtype or preset"
        return {"error": {"type": "not_finite", "message": message}}
    if any(choice.finish_reason == "constraint" for choice in completion.choices):
        message = "the prescribed form grew too complex to follow: make it simpler"
        return {"error": {"type": "constraint", "message": message}}
    pieces = [_choice(choice) for choice in completion.choices]
    return (pieces[0] if len(pieces) == 1 else {"choices": pieces}) | {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": sum(len(choice.token_ids) for choice in completion.choices),
    }


def row_sampling(values: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The defaults with a row's "sampling" over them. Raises RowError (invalid_sampling)."""
    own = values.get("sampling", {})
    if not isinstance(own, dict):
        raise RowError("invalid_sampling", f"sampling is {shown(own)}: want an object")
    if not own:
        return defaults
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    base = {name: getattr(defaults, name) for name in known}
    try:
        refuse_unknown(own, known, where="sampling")
        return from_mapping(SamplingParams, base | own, where="sampling")
    except ValueError as error:
        raise RowError("invalid_sampling", str(error)) from error


def _prompt(values: Mapping[str, Any]) -> Prompt:
    given = [name for name in PROMPT_FIELDS if name in values]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        wanted = ", ".join(PROMPT_FIELDS)
        aside = ASIDE.format(given[-1]) if given else ""
        raise RowError("invalid_row", f"the row has {found} of {wanted}: want exactly one{aside}")
    name, prompt = given[0], values[given[0]]
    if name == "messages":
        return need_messages(values)
    if name == "prompt":
        good, wanted = isinstance(prompt, str), "a text"
    else:
        good = isinstance(prompt, list) and all(type(i) is int for i in prompt)
        wanted = "a list of token ids"
    if not good:
        raise RowError("invalid_row", f"{name} is {shown(prompt)}: want {wanted}")
    if not prompt:
        raise RowError("invalid_row", f"{name} is empty: want {wanted}")
    return prompt


def _filled_in(template: Sequence[tuple[str, str | None]], values: Mapping[str, Any]) -> str:
    missing = [name for _, name in template if name is not None and values.get(name) is None]
    if missing:
        said = f"the row has no {missing[0]!r}, which job.template puts into the prompt: give it"
        raise RowError("invalid_row", said)
    return "".join(text + ("" if name is None else _text(values[name])) for text, name in template)


def _text(value: Any) -> str:
    """A text as it is, numbers and dates as they are written, all else as JSON."""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _tools(values: Mapping[str, Any]) -> list[dict] | None:
    if "tools" not in values:
        return None
    tools = values["tools"]
    if "messages" not in values:
        said = f"the row has tools and no messages: want both, or no tools{ASIDE.format('tools')}"
        raise RowError("invalid_row", said)
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        said = f"tools is {shown(tools)}: want a list of objects{ASIDE.format('tools')}"
        raise RowError("invalid_row", said)
    return tools


def _choice(choice: Choice) -> dict:
    piece = {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
    }
    if choice.logprobs is not None:
        piece["logprobs"] = [
            {"logprob": _finite(value), "top": [[i, _finite(p)] for i, p in top]}
            for value, top in choice.logprobs
        ]
    return piece


def _finite(value: float) -> float | None:
    """JSON has no infinity: the logarithm of nothing becomes null."""
    return value if math.isfinite(value) else None
