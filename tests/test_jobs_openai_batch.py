"""Batch requests in, answers out: OpenAI's own types read them, errors have the API's form."""

import base64
import json
import struct

import numpy as np
import pytest
from jobs_fakes import FakeEngine, job_config, run_job
from openai.types import Batch, Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from lepton_jax.config import SamplingParams
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scored
from lepton_jax.jobs.embed import EmbedMode
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.openai_batch import BatchMode
from lepton_jax.jobs.rows import RowError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def request(custom_id, url=CHAT, **body):
    given = {"model": "small", **({"messages": HI} if url == CHAT else {"prompt": "hi"}), **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def answers(tmp_path, *requests, name="out.jsonl", engine=None, mode="generate", **job):
    lines = (line if isinstance(line, str) else json.dumps(line) for line in requests)
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    config = job_config(tmp_path / "in.jsonl", tmp_path / name, **job, mode=mode)
    output, tally = run_job(config, engine, mode=EmbedMode("last") if mode == "embed" else None)
    return [json.loads(line) for line in output.read_text().splitlines()], tally


def test_chat_completions_are_openais(tmp_path):
    (line, two), tally = answers(
        tmp_path,
        request("a", logprobs=True, top_logprobs=2, temperature=0, user="me"),
        request("b", n=2, max_completion_tokens=2, seed=1, stop=["x"], stream=False),
    )
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("a", None, 200)
    body = ChatCompletion.model_validate(line["response"]["body"], strict=True)
    choice = body.choices[0]
    assert (choice.message.content, choice.finish_reason, body.model) == ("u:hi;", "stop", "small")
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (5, 6)
    assert [token.token for token in choice.logprobs.content] == [*"u:hi;", "<eos>"]
    assert choice.logprobs.content[0].bytes == [ord("u")]
    assert choice.logprobs.content[0].logprob == -float(ord("u"))
    both = ChatCompletion.model_validate(two["response"]["body"], strict=True)
    assert [(c.index, c.message.content, c.finish_reason) for c in both.choices] == [
        (0, "u:", "length"),
        (1, "u:", "length"),
    ]
    assert (tally.rows, tally.errors, tally.generated_tokens) == (2, 0, 10)
    assert tally.preview == [("a", "u:hi;"), ("b", "u:")]


def test_text_completions_are_openais(tmp_path):
    lines, _ = answers(
        tmp_path,
        request("a", TEXT, logprobs=0, echo=False, best_of=1),
        request("b", TEXT, prompt=[104, 105]),
        request("c", TEXT, prompt=["hi"]),
    )
    bodies = [Completion.model_validate(line["response"]["body"], strict=True) for line in lines]
    assert [body.choices[0].text for body in bodies] == ["hi", "hi", "hi"]
    logprobs = bodies[0].choices[0].logprobs
    assert (logprobs.tokens, logprobs.text_offset) == (["h", "i", "<eos>"], [0, 1, 2])
    assert logprobs.token_logprobs == [-104.0, -105.0, -256.0]


class PoolingEngine:
    """The hidden state of a prompt is (its tokens, its last token)."""

    max_len, pages = 100, (9,)

    def __init__(self):
        self._open = {}

    @property
    def has_work(self):
        return bool(self._open)

    def add_scoring(self, request_id, prompt_ids, scoring):
        self._open[request_id] = np.array([len(prompt_ids), prompt_ids[-1]], np.float32)

    def forget(self):
        assert not self._open

    def abort(self, request_id):
        self._open.pop(request_id, None)

    def step(self):
        request_id, pooled = self._open.popitem()
        nothing = np.zeros((0, 1), np.float32)
        scored = Scored(nothing, nothing > 0, pooled)
        return [StepOutput(request_id, [], None, "scored", scored)]


def test_embeddings_are_openais(tmp_path):
    url = "/v1/embeddings"
    lines, tally = answers(
        tmp_path,
        {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", "input": "ab"}},
        request("c"),
        {"custom_id": "d", "method": "POST", "url": url, "body": {"input": ["x", 3]}},
        engine=PoolingEngine(),
        mode="embed",
    )
    body = CreateEmbeddingResponse.model_validate(lines[0]["response"]["body"], strict=True)
    length = np.hypot(2, ord("b"))
    assert body.data[0].embedding == pytest.approx([2 / length, ord("b") / length], abs=1e-6)
    assert (body.model, body.usage.prompt_tokens) == ("m", 2)
    said = [line["response"]["body"]["error"]["message"] for line in lines[1:]]
    assert "--config.job.mode=generate serves it" in said[0]
    assert "input=['x', 3]: want a text, a list of token ids" in said[1]
    assert (tally.errors, tally.preview[0]) == (2, ("a", "2 numbers"))


def embeddings(tmp_path, given, **body):
    """(index, embedding) of each datum of one request, and its usage."""
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}
    (line,), tally = answers(
        tmp_path,
        asked | {"body": {"input": given, **body}},
        engine=PoolingEngine(),
        mode="embed",
    )
    assert tally.preview == [("a", "2 numbers")]
    found = line["response"]["body"]
    return [(one["index"], one["embedding"]) for one in found["data"]], found["usage"]


def unit(count, last):
    return pytest.approx([count / np.hypot(count, last), last / np.hypot(count, last)], abs=1e-6)


def test_several_inputs_have_an_embedding_each_in_their_order(tmp_path):
    data, usage = embeddings(tmp_path, ["x", "yz"])
    assert data == [(0, unit(1, ord("x"))), (1, unit(2, ord("z")))]
    assert usage == {"prompt_tokens": 3, "total_tokens": 3}


def test_token_ids_are_embedded_as_they_are(tmp_path):
    data, usage = embeddings(tmp_path, [7, 8, 9])
    assert (data, usage["prompt_tokens"]) == ([(0, unit(3, 9))], 3)
    data, usage = embeddings(tmp_path, [[7, 8], [9]])
    assert (data, usage["prompt_tokens"]) == ([(0, unit(2, 8)), (1, unit(1, 9))], 3)


def test_base64_is_of_little_endian_float32(tmp_path):
    plain, _ = embeddings(tmp_path, ["x", "yz"], encoding_format="float")
    coded, _ = embeddings(tmp_path, ["x", "yz"], encoding_format="base64")
    for (_, numbers), (_, text) in zip(plain, coded, strict=True):
        assert struct.unpack("<2f", base64.b64decode(text)) == pytest.approx(numbers, abs=1e-7)


def test_several_prompts_of_a_completion_are_choices_numbered_through(tmp_path):
    (line,), tally = answers(
        tmp_path, request("a", TEXT, prompt=["ab", "c"], n=2, max_tokens=2, seed=1)
    )
    body = Completion.model_validate(line["response"]["body"], strict=True)
    choices = [(choice.index, choice.text) for choice in body.choices]
    assert choices == [(0, "ab"), (1, "ab"), (2, "c"), (3, "c")]
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (3, 8)
    assert (tally.rows, tally.generated_tokens) == (1, 8)


def test_a_request_with_a_wrong_input_leaves_none_of_its_others_queued(tmp_path):
    engine = FakeEngine()
    engine.fails = {"c/1/0"}
    lines, _ = answers(
        tmp_path,
        request("a", TEXT, prompt=["ab", "x" * 200, "cd"]),
        request("b", TEXT, prompt=["long " * 10, "c"]),
        request("c", TEXT, prompt=["longer " * 10, "c", "long " * 10]),
        engine=engine,
    )
    refused, fine, failed = [line["response"] for line in lines]
    assert refused["status_code"] == 400
    assert "body: prompt[1]: the prompt has 200 tokens" in refused["body"]["error"]["message"]
    assert [choice["text"] for choice in fine["body"]["choices"]] == ["long " * 10, "c"]
    assert failed["status_code"] == 500
    assert engine.aborted == ["a/0/0", "c/0/0", "c/2/0"]


def test_what_cuts_answers_that_have_no_limit_of_their_own_is_said_once(tmp_path, caplog):
    answers(tmp_path, request("a", max_tokens=3), request("b", max_completion_tokens=3))
    assert "max_tokens" not in caplog.text
    answers(tmp_path, request("a"), request("b"), name="other.jsonl")
    assert caplog.text.count("at most sampling.max_tokens=128 tokens: raise it") == 1


def test_tools_go_to_the_chat_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    (line,), _ = answers(tmp_path, request("a", tools=tools, tool_choice="auto"))
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "clock!u:hi;"


def test_what_is_no_text_costs_no_other_row(tmp_path):
    schema = {"properties": {"\ud800": {"typo": 1}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    wrong = request("b", response_format=asked)
    lines, tally = answers(tmp_path, request("a", model="\ud800"), wrong, request("c"))
    assert tally.errors == 1 and len(lines) == 3
    assert lines[0]["response"]["body"]["model"] == "?"
    assert "'typo' is no keyword" in lines[1]["response"]["body"]["error"]["message"]


def test_content_in_parts_is_one_text(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    (line,), _ = answers(tmp_path, request("a", messages=[{"role": "user", "content": parts}]))
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "u:one two;"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"url": "/v1/images"}, "url is '/v1/images': want /v1/chat/completions or /v1/compl"),
        ({"url": "/v1/embeddings"}, "(--config.job.mode=embed serves it)"),
        ({"method": "GET"}, "method is 'GET'"),
        ({"body": None}, "body is missing"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"body": {"messages": HI, "tools": 3}}, "tools is 3: want a list of objects"),
        ({"body": {"messages": HI, "tool_choice": "required"}}, "want 'auto'"),
        ({"url": TEXT, "body": {"prompt": "hi", "tools": []}}, "unknown field 'tools'"),
        ({"body": {"messages": HI, "stream": True}}, "stream=True: want False"),
        ({"body": {"messages": HI, "temperature": -1}}, "temperature=-1"),
        ({"body": {"messages": HI, "logprobs": 3}}, "logprobs=3: want true or false"),
        ({"body": {"messages": HI, "top_logprobs": 2}}, "want logprobs=true with it"),
        ({"body": {"model": "small"}}, "body has no messages"),
        ({"body": {"messages": []}}, "messages is empty"),
        ({"body": {"messages": [{"role": "bad"}]}}, "messages[0].role is 'bad'"),
        ({"body": {"messages": [{"role": "user", "content": [{"image_url": 1}]}]}}, "no text"),
        ({"url": TEXT, "body": {"prompt": ["a", ""]}}, "prompt=['a', '']: want a text, a list of"),
        ({"body": {"messages": HI, "encoding_format": "float"}}, "unknown field 'encoding_format'"),
        ({"url": TEXT, "body": {"prompt": "x" * 200}}, "over max_len"),
    ],
)
def test_a_wrong_request_is_answered_as_the_api_does(tmp_path, wrong, says):
    lines, tally = answers(tmp_path, request("a"), request("b") | wrong, request("c"))
    assert [line["response"]["status_code"] for line in lines] == [200, 400, 200]
    error = lines[1]["response"]["body"]["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("line 2: ") and says in error["message"]
    assert (lines[1]["custom_id"], lines[1]["error"], tally.errors) == ("b", None, 1)


def test_response_format_prescribes_the_answer():
    mode = BatchMode(GenerateMode(SamplingParams()), "generate")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}

    def prescribed(asked):
        values = request("a", response_format=asked)
        values.pop("custom_id")
        (work,) = mode.parse(values).inner
        return work.sampling.json_schema

    assert prescribed({"type": "text"}) == {}
    assert prescribed({"type": "json_object"}) == {"type": "object"}
    named = {"name": "report", "strict": True, "schema": schema}
    assert prescribed({"type": "json_schema", "json_schema": named}) == schema
    for wrong in (
        {"type": "json_schema"},
        {"type": "xml"},
        "json",
        {"type": "json_schema"} | named,
    ):
        with pytest.raises(RowError, match="response_format=.*: want text, json_object"):
            prescribed(wrong)
    with pytest.raises(RowError, match="uniqueItems"):
        prescribed({"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}})


def test_a_line_that_is_no_request_and_a_model_that_fails(tmp_path):
    engine = FakeEngine()
    engine.fails = {"c/0/0"}
    lines, tally = answers(tmp_path, request("a"), "{", request("a"), request("c"), engine=engine)
    assert [line["error"] and line["error"]["code"] for line in lines] == [
        None,
        "invalid_json",
        "duplicate_id",
        None,
    ]
    assert lines[1]["response"] is None and lines[1]["custom_id"] == "2"
    assert lines[3]["response"]["status_code"] == 500
    assert tally.error_types == {"invalid_json": 1, "duplicate_id": 1, "not_finite": 1}


def test_every_line_has_the_fields_that_a_batch_client_reads(tmp_path):
    lines, _ = answers(tmp_path, request("a"), "{", name="out.jsonl")
    ids = [line["id"] for line in lines]
    assert len(set(ids)) == 2 and all(i.startswith("batch_req_") for i in ids)
    assert "output_file_id" in Batch.model_fields  # the client that fetches such a file is there


def test_the_format_is_seen_in_the_first_line_or_said(tmp_path):
    (line,), _ = answers(tmp_path, request("a"), format="jsonl")
    assert line["error"]["type"] == "invalid_row"
    (line,), _ = answers(tmp_path, {"id": "a", "prompt": "hi"}, format="openai_batch")
    assert line["response"]["status_code"] == 400
    with pytest.raises(JobError, match="give a job.output in .jsonl"):
        answers(tmp_path, request("a"), name="out.csv")
