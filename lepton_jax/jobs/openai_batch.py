"""OpenAI's batch files: requests {"custom_id", "method", "url", "body"} in, their answers out.

Source: OpenAI's API reference, "Batch", "The request input object" and "The request output object";
"Create chat completion", "Create completion", "Create embeddings". The mode generate serves
/v1/chat/completions and /v1/completions, the mode embed /v1/embeddings.
A body may also hold our own sampling fields, such as top_k; what it leaves open the config says, so
an unset temperature is `sampling.temperature`, not 1. `created` is 0: an answer depends on no
clock, and a job that was killed gives the same file. Tools go to the chat template, and a call of
one is the answer's content, as the model writes it. A request that is wrong is answered as the API
does, with status 400; a line that is no request has "error" and no response. Read next:
`generate.py`.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.config import SamplingParams, refuse_unknown
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.framing import Counts, cut_answers
from lepton_jax.jobs.modes import IndependentRows, Mode, ModeSession, Progress
from lepton_jax.jobs.rows import BadRow, Row, RowError, RowId, shown
from lepton_jax.jobs.session import Engine
from lepton_jax.text.tokenizer import Tokenizer

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS = {"generate": (CHAT, TEXT), "embed": (EMBED,)}  # by the mode that serves them
_PROMPTS = {CHAT: "messages", TEXT: "prompt"}
_SAMPLING = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "logprobs"]
# These change nothing of an answer here; whatever is neither here nor below is refused by name.
_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "safety_identifier")
_ONLY = {  # fields with the only value that is served
    "stream": False,
    "echo": False,
    "best_of": 1,
    "encoding_format": "float",
    "tool_choice": "auto",
}
_NO_LOGPROB = -9999.0  # OpenAI's for a token that can't be
_UNREAD = ("invalid_json", "duplicate_id")


@dataclasses.dataclass(frozen=True)
class BatchWork:
    """A request: where it goes, the name of its model, and the work of its mode."""

    url: str
    model: str
    inner: Any


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
        row = _text_row(given) if url == EMBED else _prompt_row(url, given)
        return BatchWork(url, str(given.get("model", "lepton_jax")), self._inner.parse(row))

    def requests(self, work: BatchWork, tokenizer: Tokenizer) -> list[tuple[int, SamplingParams]]:
        return self._inner.requests(work.inner, tokenizer)

    def open(self, engine: Engine, tokenizer: Tokenizer) -> "BatchSession":
        return BatchSession(self._inner.open(engine, tokenizer), tokenizer)


class BatchSession:
    """A session of that mode whose rows become the bodies of responses."""

    def __init__(self, inner: ModeSession, tokenizer: Tokenizer):
        self._inner, self._tokenizer = inner, tokenizer
        self._works: dict[str, BatchWork] = {}

    @property
    def has_work(self) -> bool:
        return self._inner.has_work

    def __len__(self) -> int:
        return len(self._inner)

    def add(self, key: str, work: BatchWork) -> None:
        self._inner.add(key, work.inner)
        self._works[key] = work

    def step(self) -> list[Progress]:
        return [self._answered(progress) for progress in self._inner.step()]

    def close(self) -> None:
        self._inner.close()

    def _answered(self, progress: Progress) -> Progress:
        if progress.row is None:
            return progress
        work = self._works.pop(progress.key)
        if "error" in progress.row:
            return progress
        if work.url == EMBED:
            body = _embedding_body(work, progress.row)
        else:
            body = _body(progress.key, work, progress.row, self._tokenizer)
        return dataclasses.replace(progress, row={"body": body})


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
            text = f"{len(body['data'][0]['embedding'])} numbers"
        cut = cut_answers(body.get("choices", []))
        return Counts("", usage["prompt_tokens"], usage.get("completion_tokens", 0), text, cut=cut)


def _check(body: Mapping[str, Any], known: Sequence[str]) -> None:
    try:
        refuse_unknown(body, [*known, *_WITHOUT_EFFECT, *_ONLY], where="body")
    except ValueError as error:
        raise RowError("invalid_row", str(error)) from error
    for name, only in _ONLY.items():
        if name in body and body[name] != only:
            raise RowError("invalid_row", f"body: {name}={body[name]!r}: want {only!r}")


def _text_row(body: Mapping[str, Any]) -> dict[str, Any]:
    """The row of embed that a request's body means."""
    _check(body, ["input"])
    given = body.get("input")
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, str):
        raise RowError("invalid_row", "body: input is no text: give one text a request")
    return {"text": given}


def _prompt_row(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The row of generate that a request's body means."""
    prompt = _PROMPTS[url]
    chat = ["max_completion_tokens", "response_format", "tools", "top_logprobs"]
    own = chat if url == CHAT else []
    _check(body, [prompt, "logprobs", *own, *_SAMPLING])
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
    if prompt not in body:
        raise RowError("invalid_row", f"body has no {prompt}")
    tools = {"tools": body["tools"]} if "tools" in body else {}
    return {**_prompt(url, body[prompt]), **tools, "sampling": sampling}


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


def _prompt(url: str, given: Any) -> dict[str, Any]:
    if url == CHAT:
        listed = isinstance(given, list)
        return {"messages": [_message(message) for message in given] if listed else given}
    if isinstance(given, list):
        if len(given) == 1 and isinstance(given[0], (str, list)):
            given = given[0]
        elif not all(type(i) is int for i in given):
            raise RowError("invalid_row", "body: prompt has several texts: give one a request")
    return {"prompt_tokens" if isinstance(given, list) else "prompt": given}


def _message(message: Any) -> Any:
    """Content in parts becomes one text; what isn't text is refused."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RowError("invalid_row", "a message's content has a part that is no text: want text")
    return message | {"content": "".join(texts)}


def _body(key: str, work: BatchWork, result: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    chat = work.url == CHAT
    choices = []
    for index, piece in enumerate(result.get("choices") or [result]):
        logprobs = piece.get("logprobs")
        if logprobs is not None:
            write = _chat_logprobs if chat else _text_logprobs
            logprobs = write(piece["token_ids"], logprobs, tokenizer)
        message = {"role": "assistant", "content": piece["text"], "refusal": None}
        said = {"message": message} if chat else {"text": piece["text"]}
        end = {"logprobs": logprobs, "finish_reason": piece["finish_reason"]}
        choices.append({"index": index, **said, **end})
    used = result["prompt_tokens"], result["completion_tokens"]
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


def _embedding_body(work: BatchWork, result: dict) -> dict[str, Any]:
    used = result["prompt_tokens"]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": result["embedding"]}],
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
