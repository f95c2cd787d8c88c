"""Prompts become answers: texts, messages or ids go in, an engine is driven, text comes out.

The piece under `LeptonEngine.generate`, `LeptonEngine.stream` and every job. An engine is anything
with the methods of `TokenEngine`; it sees token ids only. A prompt with n > 1 is n requests.
Read next: `text/detokenizer.py`.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

from lepton_jax.config import SamplingParams
from lepton_jax.engine.protocol import TokenEngine as Engine
from lepton_jax.engine.request import StepOutput
from lepton_jax.jobs.rows import Prompt, RowError, shown
from lepton_jax.text.constraints import ConstraintError, Grammar
from lepton_jax.text.detokenizer import Detokenizer
from lepton_jax.text.tokenizer import Tokenizer

TokenLogprob = tuple[float, list[tuple[int, float]]]
Params = SamplingParams | Sequence[SamplingParams]  # the same for all prompts, or one for each


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer to a prompt.

    Attributes:
      text: without stop strings and without the token that ended it.
      token_ids: the generated ids. An end-of-text or stop id is the last of them; after a stop
        string they are cut to those that the text needs.
      finish_reason: "stop", "length", "error" where the model gave no finite logits, or
        "constraint" where the prescribed form couldn't be followed to its end.
      logprobs: for each id (log-probability, [(id, log-probability) of the likeliest]); None where
        not asked.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """All answers to a prompt, `SamplingParams.n` of them; `text` and the like are the first's."""

    choices: tuple[Choice, ...]
    prompt_tokens: int

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.choices[0].logprobs


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a beat added to one choice of a prompt.

    Attributes:
      key: the prompt's, as given to `Session.add`; `choice` counts its answers from 0.
      text: new text, in whole characters; what may begin a stop string is held back.
      new_tokens: how many tokens came.
      finish_reason: of the choice, on its last delta.
      completion: of the prompt, on the last delta of its last choice.
      restarted: what came before of this choice is void (`StepOutput.restarted`).
    """

    key: str
    choice: int
    text: str
    new_tokens: int
    finish_reason: str | None = None
    completion: Completion | None = None
    restarted: bool = False


def encode(
    tokenizer: Tokenizer, prompt: Prompt, tools: Sequence[Mapping] | None = None
) -> list[int]:
    """Ids of a prompt: a text (with bos where the model wants it), messages, which may offer tools,
    or ids as they are.

    Raises RowError (invalid_prompt) where the tokenizer or its chat template refuses it.
    """
    chat = not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping)
    if tools and not chat:
        raise RowError("invalid_prompt", f"tools go with messages, not with {shown(prompt)}")
    try:
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        return tokenizer.apply_chat(prompt, tools) if chat else list(prompt)
    except ValueError as error:
        raise RowError("invalid_prompt", str(error)) from error


def with_stop_ids(tokenizer: Tokenizer, params: SamplingParams) -> SamplingParams:
    """Params whose stop texts that are control tokens are stop ids: these spell nothing."""
    found = {text: _control_id(tokenizer, text) for text in params.stop}
    ids = [token_id for token_id in found.values() if token_id is not None]
    if not ids:
        return params
    texts = tuple(text for text in params.stop if found[text] is None)
    return dataclasses.replace(
        params, stop=texts, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *ids)))
    )


def _control_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The control token that a text spells whole; None where it is another text."""
    ids = tokenizer.encode(text, add_special=False)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.control_ids else None


def grammar_of(params: SamplingParams) -> Grammar | None:
    """What prescribes an answer's form. Raises RowError (invalid_sampling) where nothing can."""
    try:
        return Grammar.of(params)
    except ConstraintError as error:
        raise RowError("invalid_sampling", str(error)) from error


def params_of_each(count: int, params: Params) -> Sequence[SamplingParams]:
    """Those of each of `count` prompts. Raises ValueError on a list of another length."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"{count} prompts and {len(params)} SamplingParams: want one for each prompt, or a "
            "single one for all"
        )
    return params


def expand(params: SamplingParams) -> list[SamplingParams]:
    """The params of each of a prompt's `n` requests; a seed counts up from the first."""
    if params.n == 1:
        return [params]  # a row's usual case costs no checks
    if params.seed is None:
        return [dataclasses.replace(params, n=1)] * params.n
    return [dataclasses.replace(params, n=1, seed=params.seed + i) for i in range(params.n)]


class OneAsker:
    """Held by who drives an engine. Raises RuntimeError where another thread does: each would take
    what came for the other.
    """

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "another thread is asking this engine: wait until it is answered, or ask all in "
                "one call, which is faster too"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Session:
    """Prompts that are being answered by one engine. Nobody else may step the engine meanwhile."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self._engine, self._tokenizer = engine, tokenizer
        self._prompts: dict[str, _OpenPrompt] = {}
        self._unfinished = 0

    @property
    def has_work(self) -> bool:
        """Whether some prompt is not answered yet."""
        return bool(self._prompts)

    def __len__(self) -> int:
        """Requests that are not finished."""
        return self._unfinished

    def add(
        self,
        key: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        tools: Sequence[Mapping] | None = None,
    ) -> None:
        """Queues a prompt under a key of its own. Draws of rows without a seed depend on the key.

        Raises RowError, and queues nothing: invalid_prompt, or refused by the engine.
        """
        if key in self._prompts:
            raise RowError("duplicate_id", f"{key!r} is already being answered: keys must differ")
        ids = encode(self._tokenizer, prompt, tools)
        params = with_stop_ids(self._tokenizer, params)
        grammar = grammar_of(params)
        added = []
        try:
            if grammar:  # what can't be held is the row's problem, and must not meet a replica
                grammar.guide(self._tokenizer)
            for i, single in enumerate(expand(params)):
                # The number is always there, so that no key with a slash can meet another's.
                self._engine.add_request(f"{key}/{i}", ids, single)
                added.append(f"{key}/{i}")
        except ValueError as error:
            for request_id in added:
                self._engine.abort(request_id)
            raise RowError("refused", str(error)) from error
        chat = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        continues = bool(params.guided) or not chat  # a prescribed form says each space itself
        growing = [_GrowingChoice(self._tokenizer, params, continues=continues) for _ in added]
        self._prompts[key] = _OpenPrompt(growing, len(ids))
        self._unfinished += len(growing)

    def step(self) -> list[Delta]:
        """One beat of the engine."""
        if not self._engine.has_work:
            raise RuntimeError(f"the engine is idle with {len(self)} requests unanswered")
        return [self._take(output) for output in self._engine.step()]

    def deltas(self) -> Iterator[Delta]:
        """Steps until all prompts are answered."""
        while self.has_work:
            yield from self.step()

    def drop(self, key: str) -> None:
        """Forgets a prompt, unless it is answered."""
        prompt = self._prompts.pop(key, None)
        if prompt is not None:
            self._unfinished -= prompt.unfinished
            for i in range(len(prompt.choices)):
                self._engine.abort(f"{key}/{i}")

    def close(self) -> None:
        """Drops what is not answered yet."""
        for key in list(self._prompts):
            self.drop(key)

    def _take(self, output: StepOutput) -> Delta:
        key, _, number = output.request_id.rpartition("/")
        prompt, i = self._prompts[key], int(number)
        if output.restarted:
            prompt.choices[i] = prompt.choices[i].afresh()
        choice = prompt.choices[i]
        text = choice.take(output)
        self._unfinished -= choice.finish_reason is not None
        if choice.finish_reason and not output.finish_reason:
            self._engine.abort(output.request_id)
        completion = None
        if not prompt.unfinished:
            del self._prompts[key]
            done = tuple(choice.done() for choice in prompt.choices)
            completion = Completion(done, prompt.prompt_tokens)
        return Delta(
            key,
            i,
            text,
            len(output.token_ids),
            finish_reason=choice.finish_reason,
            completion=completion,
            restarted=output.restarted,
        )


@dataclasses.dataclass(frozen=True)
class _OpenPrompt:
    choices: list["_GrowingChoice"]
    prompt_tokens: int

    @property
    def unfinished(self) -> int:
        return sum(choice.finish_reason is None for choice in self.choices)


class _GrowingChoice:
    """Ids, log-probabilities and text of one request so far."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, continues: bool):
        self.finish_reason: str | None = None
        self._of = tokenizer, params
        self._continues = continues
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._text = _StoppableText(tokenizer, params, continues=continues)

    def afresh(self) -> "_GrowingChoice":
        """The same request before anything came."""
        return _GrowingChoice(*self._of, continues=self._continues)

    def take(self, output: StepOutput) -> str:
        """Adds what came; returns the new text."""
        self._ids += output.token_ids
        if self._logprobs is not None:
            self._logprobs += output.logprobs or []
        ended_by_token = output.finish_reason == "stop"
        delta = self._text.add(output.token_ids[:-1] if ended_by_token else output.token_ids)
        self.finish_reason = "stop" if output.finish_reason == "whole" else output.finish_reason
        if output.finish_reason and not self._text.stopped:
            delta += self._text.finish()
        if self._text.stopped:
            self.finish_reason = "stop"
            needed = self._text.needed_ids()
            del self._ids[needed:]
            if self._logprobs is not None:
                del self._logprobs[needed:]
        return delta

    def done(self) -> Choice:
        return Choice(self._text.text, self._ids, self.finish_reason, self._logprobs)


class _Characters:
    """Spells each code point as itself: with it a `Detokenizer` finds stop strings in text."""

    control_ids: frozenset[int] = frozenset()
    leading_space = False

    def id_to_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class _StoppableText:
    """The text of growing ids, cut at the first stop string that begins after `min_tokens` ids.

    Spelling and stop strings are two stages, because the first ids are spelled but not searched.
    `continues`: the ids go on with the prompt's text; otherwise they are a message of their own.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, continues: bool):
        self._spelled = Detokenizer(tokenizer, continues=continues)
        self._searched = Detokenizer(_Characters(), params.stop)
        self._unsearched_ids = params.min_tokens if params.stop else math.inf
        self._pieces: list[str] = []
        self._ends: list[int] = []  # characters spelled up to and with each id

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def stopped(self) -> bool:
        return self._searched.stopped

    def add(self, ids: Sequence[int]) -> str:
        """Takes ids up to the one that completes a stop string; returns the text now certain."""
        first = len(self._pieces)
        for token_id in ids:
            if self.stopped:
                break
            spelled, _ = self._spelled.add([token_id])
            self._ends.append(len(spelled) + (self._ends[-1] if self._ends else 0))
            self._pieces.append(self._search(spelled))
        return "".join(self._pieces[first:])

    def finish(self) -> str:
        """The rest, once no more ids come."""
        rest = self._search(self._spelled.finish()) + self._searched.finish()
        self._pieces.append(rest)
        return rest

    def needed_ids(self) -> int:
        """The least number of ids that spell the text."""
        length = len(self.text)
        if not length:
            return 0
        return next((n for n, end in enumerate(self._ends, 1) if end >= length), len(self._ends))

    def _search(self, spelled: str) -> str:
        if len(self._ends) <= self._unsearched_ids:
            return spelled
        return self._searched.add(map(ord, spelled))[0]
