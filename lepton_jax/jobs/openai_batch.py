"""OpenAI's batch files: requests {"custom_id", "method", "url", "body"} in, their answers out.

Source: OpenAI's API reference, "Batch", "The request input object" and "The request output object";
"Create chat completion", "Create completion", "Create embeddings". The mode generate serves
/v1/chat/completions and /v1/completions, the mode embed /v1/embeddings.
A body may also hold our own sampling fields, such as top_k; what it leaves open the config says, so
an unset temperature is `sampling.temperature`, not 1, and an unset limit `sampling.max_tokens`.
Each input of a request is a work of its own; the request is answered when all of them are.
`created` is 0: an answer depends on no clock, and a job that was killed gives the same file. Tools
go to the chat template, and a call of one is the answer's content, as the model writes it. A
request that is wrong is answered as the API does, with status 400; a line that is no request has
"error" and no response. Read next: `generate.py`.
"""

import base64
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lepton_jax.config import SamplingParams, refuse_unknown
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.framing import Counts, cut_answers
from lepton_jax.jobs.modes import IndependentRows, Mode, ModeSession, Progress
from lepton_jax.jobs.rows import BadRow, Row, RowError, RowId, shown
from lepton_jax.jobs.session import Engine
from lepton_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS = {"generate": (CHAT, TEXT), "embed": (EMBED,)}  # by the mode that serves them
_INPUTS = {CHAT: "messages", TEXT: "prompt", EMBED: "input"}
_FIELDS = {str: "prompt", list: "prompt_tokens"}  # of a row of generate, by the type of its prompt
_LIMITS = ("max_tokens", "max_completion_tokens")
_SAMPLING = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "logprobs"]
# These change nothing of an answer here; whatever is neither here nor below is refused by name.
_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "safety_identifier")
_ONLY = {  # fields with the only value that is served
    "stream": False,
    "echo": False,
    "best_of": 1,
    "tool_choice": "auto",
}
_NO_LOGPROB = -9999.0  # OpenAI's for a token that can't be
_UNREAD = ("invalid_json", "duplicate_id")
Input = str | list[int]


@dataclasses.dataclass(frozen=True)
class BatchWork:
    """A request: where it goes, the name of its model, a work of its mode for each of its inputs,
    and whether embeddings are to come in base64.
    """

    url: str
    model: str
    inner: tuple[Any, ...]
    base64: bool = False


class PartSession(ModeSession, Protocol):
    """A session of a mode that serves requests."""

    def drop(self, key: str) -> None:
        """Forgets a row, unless it is answered."""


class BatchMode(IndependentRows):
    """Requests as rows of another mode, `name` in the config."""

    fields = ("method", "url", "body")

    def __init__(self, inner: Mode, name: str):
        """Raises JobError where the mode serves no requests."""
        if name not in URLS:
            raise JobError(
                f"job.mode={name!r} serves no batch requests: want one of {', '.join(URLS)}"
            )
        self._inner, self._urls = inner, URLS[name]
        self._told = False  # of the limit that requests don't give

    def parse(self, values: Mapping[str, Any]) -> BatchWork:
        """Raises RowError (invalid_row, invalid_sampling)."""
        url, body = values.get("url"), values.get("body")
        if values.get("method", "POST") != "POST":
            raise RowError("invalid_row", f"method is {values['method']!r}: want 'POST'")
        if url not in self._urls:
            other = [name for name, urls in URLS.items() if url in urls]
            hint = f" (--config.job.mode={other[0]} serves it)" if other else ""
            wanted = " or ".join(self._urls)
            raise RowError("invalid_row", f"url is {url!r}: want {wanted}{hint}")
        if not isinstance(body, dict):
            raise RowError("invalid_row", "body is missing or no object: want the request's")
        given = {name: value for name, value in body.items() if value is not None}
        model = str(given.get("model", "lepton_jax"))
        if url == EMBED:
            works = _embedded(given)  # texts and ids are its works
            return BatchWork(url, model, works, base64=given.get("encoding_format") == "base64")
        works = tuple(self._inner.parse(row) for row in _prompt_rows(url, given))
        if not any(name in given for name in _LIMITS):
            self._tell_limit(works[0].sampling.max_tokens)
        return BatchWork(url, model, works)

    def requests(self, work: BatchWork, tokenizer: Tokenizer) -> list[tuple[int, SamplingParams]]:
        of_one = self._inner.requests
        return [request for inner in work.inner for request in of_one(inner, tokenizer)]

    def open(self, engine: Engine, tokenizer: Tokenizer) -> "BatchSession":
        return BatchSession(self._inner.open(engine, tokenizer), tokenizer)

    def _tell_limit(self, most: int) -> None:
        """Says once what cuts answers that OpenAI's API would let run to their end."""
        if not self._told:
            log.warning(
                "requests without max_tokens get at most sampling.max_tokens=%d tokens: raise it "
                "for longer answers",
                most,
            )
        self._told = True


class BatchSession:
    """A session of that mode whose rows become the bodies of responses."""

    def __init__(self, inner: PartSession, tokenizer: Tokenizer):
        self._inner, self._tokenizer = inner, tokenizer
        # Of each open request the work, and the rows of those inputs that are done.
        self._open: dict[str, tuple[BatchWork, dict[int, dict]]] = {}

    @property
    def has_work(self) -> bool:
        return self._inner.has_work

    def __len__(self) -> int:
        return len(self._inner)

    def add(self, key: str, work: BatchWork) -> None:
        """Queues all of a request's inputs. Raises RowError, and queues none of them."""
        for number, inner in enumerate(work.inner):
            try:
                # The number is always there, so that no key with a slash can meet another's.
                self._inner.add(f"{key}/{number}", inner)
            except RowError as error:
                self._drop(key, number)
                if len(work.inner) == 1:
                    raise
                where = f"body: {_INPUTS[work.url]}[{number}]"
                raise RowError(error.kind, f"{where}: {error}") from error
        self._open[key] = work, {}

    def step(self) -> list[Progress]:
        return [self._taken(progress) for progress in self._inner.step()]

    def close(self) -> None:
        self._inner.close()

    def _taken(self, progress: Progress) -> Progress:
        key, _, number = progress.key.rpartition("/")
        return Progress(key, progress.tokens, self._answer(key, int(number), progress.row))

    def _answer(self, key: str, number: int, row: dict | None) -> dict | None:
        """The request's output row, when the last of its inputs is done or one has failed."""
        if row is None or key not in self._open:  # another one has failed
            return None
        work, rows = self._open[key]
        rows[number] = row
        if "error" in row:
            self._drop(key, len(work.inner))
        elif len(rows) < len(work.inner):
            return None
        del self._open[key]
        if "error" in row:
            return row
        results = [rows[i] for i in range(len(rows))]
        if work.url == EMBED:
            return {"body": _embedding_body(work, results)}
        return {"body": _body(key, work, results, self._tokenizer)}

    def _drop(self, key: str, count: int) -> None:
        """Forgets the first inputs of a request."""
        for number in range(count):
            self._inner.drop(f"{key}/{number}")


class BatchFraming:
    """{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}."""

    id_field = "custom_id"

    def frame(self, row: Row | BadRow, result: dict) -> dict:
        response, failure = None, None
        error = result.get("error")
        if error and error["type"] in _UNREAD:
            message = f"line {row.record.where}: {error['message']}"
            failure = {"code": error["type"], "message": message}
        else:
            status, body = 200, result.get("body")
            if error:
                status = 500 if error["type"] == "not_finite" else 400
                kind = "server_error" if status == 500 else "invalid_request_error"
                message = f"line {row.record.where}: {error['message']}"
                said = {"message": message, "type": kind, "param": None, "code": error["type"]}
                body = {"error": said}
            request_id = _name("req", row.id)
            response = {"status_code": status, "request_id": request_id, "body": body}
        own = _name("batch_req", row.id)
        return {"id": own, "custom_id": str(row.id), "response": response, "error": failure}

    def row_id(self, line: dict) -> RowId | None:
        return line.get("custom_id")

    def counts(self, line: dict) -> Counts:
        failure = line["error"] or line["response"]["body"].get("error")
        if failure:
            return Counts(failure["code"], 0, 0, f"({failure['code']}) {failure['message']}")
        body = line["response"]["body"]
        usage = body["usage"]
        if "choices" in body:
            first = body["choices"][0]
            text = first["message"]["content"] if "message" in first else first["text"]
        else:
            first = body["data"][0]["embedding"]
            count = len(base64.b64decode(first)) // 4 if isinstance(first, str) else len(first)
            text = f"{count} numbers"
        cut = cut_answers(body.get("choices", []))
        return Counts("", usage["prompt_tokens"], usage.get("completion_tokens", 0), text, cut=cut)


def _check(body: Mapping[str, Any], known: Sequence[str], *, need: str) -> None:
    try:
        refuse_unknown(body, [need, *known, *_WITHOUT_EFFECT, *_ONLY], where="body")
    except ValueError as error:
        raise RowError("invalid_row", str(error)) from error
    for name, only in _ONLY.items():
        if name in body and body[name] != only:
            raise RowError("invalid_row", f"body: {name}={body[name]!r}: want {only!r}")
    if need not in body:
        raise RowError("invalid_row", f"body has no {need}")


def _embedded(body: Mapping[str, Any]) -> tuple[Input, ...]:
    """What a request's body asks embeddings of."""
    _check(body, ["encoding_format"], need="input")
    coded = body.get("encoding_format", "float")
    if coded not in ("float", "base64"):
        wanted = "want 'float' or 'base64'"
        raise RowError("invalid_row", f"body: encoding_format={shown(coded)}: {wanted}")
    return tuple(_inputs("input", body["input"]))


def _prompt_rows(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of generate that a request's body means."""
    prompt = _INPUTS[url]
    chat = ["max_completion_tokens", "response_format", "tools", "top_logprobs"]
    own = chat if url == CHAT else []
    _check(body, ["logprobs", *own, *_SAMPLING], need=prompt)
    sampling = {name: body[name] for name in _SAMPLING if name in body}
    if "max_completion_tokens" in body:
        sampling["max_tokens"] = body["max_completion_tokens"]
    logprobs = body.get("logprobs")
    if url == CHAT:
        if not isinstance(logprobs, bool | None):
            raise RowError("invalid_row", f"body: logprobs={logprobs!r}: want true or false")
        if "top_logprobs" in body and not logprobs:
            raise RowError("invalid_row", "body: top_logprobs is given: want logprobs=true with it")
        logprobs = body.get("top_logprobs", 0) if logprobs else None
        sampling |= _answer_form(body.get("response_format", {"type": "text"}))
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    given = body[prompt]
    if url == TEXT:
        return [{_FIELDS[type(one)]: one, "sampling": sampling} for one in _inputs(prompt, given)]
    messages = [_message(message) for message in given] if isinstance(given, list) else given
    tools = {"tools": body["tools"]} if "tools" in body else {}
    return [{"messages": messages, **tools, "sampling": sampling}]


def _answer_form(asked: Any) -> dict[str, Any]:
    """The sampling field that a request's response_format means."""
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    named = asked.get("json_schema") if kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, dict) else None
    if isinstance(schema, dict) and schema:
        return {"json_schema": schema}
    wanted = "text, json_object, or json_schema with a schema"
    raise RowError("invalid_row", f"body: response_format={shown(asked)}: want {wanted}")


def _inputs(name: str, given: Any) -> list[Input]:
    """A field's inputs: a text or a list of token ids is one, a list of these is several."""
    several = isinstance(given, list) and not all(type(i) is int for i in given)
    inputs = given if several else [given]
    for one in inputs:
        ids = isinstance(one, list) and all(type(i) is int for i in one)
        if not one or not (ids or isinstance(one, str)):
            wanted = "a text, a list of token ids, or a list of several of these, none empty"
            raise RowError("invalid_row", f"body: {name}={shown(given)}: want {wanted}")
    return inputs


def _message(message: Any) -> Any:
    """Content in parts becomes one text; what isn't text is refused."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RowError("invalid_row", "a message's content has a part that is no text: want text")
    return message | {"content": "".join(texts)}


def _body(
    key: str, work: BatchWork, results: Sequence[dict], tokenizer: Tokenizer
) -> dict[str, Any]:
    """`results` of each input; their choices are numbered through."""
    chat = work.url == CHAT
    choices = []
    pieces = [piece for result in results for piece in result.get("choices") or [result]]
    for index, piece in enumerate(pieces):
        logprobs = piece.get("logprobs")
        if logprobs is not None:
            write = _chat_logprobs if chat else _text_logprobs
            logprobs = write(piece["token_ids"], logprobs, tokenizer)
        message = {"role": "assistant", "content": piece["text"], "refusal": None}
        said = {"message": message} if chat else {"text": piece["text"]}
        end = {"logprobs": logprobs, "finish_reason": piece["finish_reason"]}
        choices.append({"index": index, **said, **end})
    used = [sum(result[f"{of}_tokens"] for result in results) for of in ("prompt", "completion")]
    return {
        "id": _name("chatcmpl" if chat else "cmpl", key),
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": work.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": used[0],
            "completion_tokens": used[1],
            "total_tokens": sum(used),
        },
    }


def _embedding_body(work: BatchWork, results: Sequence[dict]) -> dict[str, Any]:
    used = sum(result["prompt_tokens"] for result in results)
    vectors = [result["embedding"] for result in results]
    if work.base64:  # of little-endian float32
        vectors = [base64.b64encode(np.array(v, "<f4").tobytes()).decode() for v in vectors]
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "model": work.model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


def _chat_logprobs(ids: list[int], logprobs: list[dict], tokenizer: Tokenizer) -> dict[str, Any]:
    def token(token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = tokenizer.id_to_bytes(token_id)
        value = _NO_LOGPROB if logprob is None else logprob
        return {"token": _text(spelled), "logprob": value, "bytes": list(spelled)}

    return {
        "content": [
            token(i, entry["logprob"]) | {"top_logprobs": [token(*top) for top in entry["top"]]}
            for i, entry in zip(ids, logprobs, strict=True)
        ],
        "refusal": None,
    }


def _text_logprobs(ids: list[int], logprobs: list[dict], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [_text(tokenizer.id_to_bytes(i)) for i in ids]
    offsets = [0, *itertools.accumulate(map(len, tokens))][: len(tokens)]
    tops = [
        {_text(tokenizer.id_to_bytes(i)): _NO_LOGPROB if p is None else p for i, p in entry["top"]}
        for entry in logprobs
    ]
    values = [_NO_LOGPROB if e["logprob"] is None else e["logprob"] for e in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _text(spelled: bytes) -> str:
    return spelled.decode(errors="replace")


def _name(kind: str, row_id: RowId) -> str:
    return f"{kind}_{hashlib.blake2b(str(row_id).encode(), digest_size=12).hexdigest()}"
