"""Every kind of bad row becomes an error row that says why; its neighbours are untouched."""

import json

import pytest

from lepton_jax.config import JobSection, SamplingParams
from lepton_jax.jobs.files.source import Source
from lepton_jax.jobs.generate import GenerateMode, PromptWork
from lepton_jax.jobs.rows import BadRow, IdSet, read_rows

GOOD = {"id": "good", "prompt": "hello"}


def rows_of(tmp_path, *lines, defaults=None, template=""):
    data = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    source = Source(JobSection(input=str(path), template=template))
    mode = GenerateMode(defaults or SamplingParams(), template)
    return list(read_rows(source, mode, strict=source.strict))


def test_the_three_kinds_of_prompt(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = rows_of(
        tmp_path, GOOD, {"id": 7, "messages": chat}, b"", b"  \r", {"prompt_tokens": [1, 2]}
    )
    assert [row.id for row in rows] == ["good", 7, "5"]
    assert [row.work.prompt for row in rows] == ["hello", chat, [1, 2]]


def test_sampling_of_a_row_goes_over_the_defaults(tmp_path):
    defaults = SamplingParams(max_tokens=9, temperature=0.5, stop=("x",))
    row = GOOD | {"sampling": {"temperature": 1, "logit_bias": {"3": -1}}}
    plain, own = rows_of(tmp_path, GOOD, row | {"id": "own"}, defaults=defaults)
    assert plain.work.sampling == defaults
    assert own.work.sampling == SamplingParams(
        max_tokens=9, temperature=1, stop=("x",), logit_bias={3: -1.0}
    )


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        (b'{"id": "a", "prompt": "x"', "invalid_json", "not valid JSON"),
        (b'{"prompt": "\xff"}', "invalid_json", "utf-8"),
        (b"[" * 100_000, "invalid_json", "not valid JSON"),
        ([1], "invalid_row", "list"),
        ({"id": "a", "promt": "x"}, "invalid_row", "did you mean 'prompt'"),
        ({"id": "a", "promt": "x"}, "invalid_row", "by --config.job.columns=other=promt"),
        (b'{"a": ' * 129 + b"1" + b"}" * 129, "invalid_json", "more than 128 objects and lists"),
        ({"id": "a"}, "invalid_row", "none of prompt, messages, prompt_tokens"),
        ({"id": "a", "prompt": "x", "messages": []}, "invalid_row", "prompt and messages"),
        ({"id": "a", "prompt": ""}, "invalid_row", "prompt is empty"),
        ({"id": "a", "prompt": None}, "invalid_row", "prompt is None: want a text"),
        ({"id": "a", "messages": ["hi"]}, "invalid_row", "objects"),
        ({"id": "a", "messages": []}, "invalid_row", "messages is empty"),
        ({"id": "a", "prompt_tokens": []}, "invalid_row", "prompt_tokens is empty"),
        ({"id": "a", "prompt_tokens": [1, True]}, "invalid_row", "token ids"),
        ({"id": "a", "prompt": "x", "tools": []}, "invalid_row", "tools and no messages"),
        ({"id": "a", "messages": [{}], "tools": ["f"]}, "invalid_row", "tools is ['f']: want a"),
        ({"id": "", "prompt": "x"}, "invalid_row", "id=''"),
        ({"id": None, "prompt": "x"}, "invalid_row", "id=None"),
        (b'{"id": "\\ud800", "prompt": "x"}', "invalid_row", "ud800"),
        ({"id": "a", "prompt": "x", "sampling": 3}, "invalid_sampling", "want an object"),
        (
            {"id": "a", "prompt": "x", "sampling": {"temprature": 1}},
            "invalid_sampling",
            "did you mean 'temperature'",
        ),
        ({"id": "a", "prompt": "x", "sampling": {"top_p": 0}}, "invalid_sampling", "top_p=0"),
        (b'{"prompt": "x", "sampling": {"temperature": NaN}}', "invalid_sampling", "nan"),
        ({"id": "a", "prompt": "x", "sampling": {"stop": [1]}}, "invalid_sampling", "stop=[1]"),
        (
            {"id": "a", "prompt": "x", "sampling": {"temperature": 10**400}},
            "invalid_sampling",
            "want 0 to 1e+30",
        ),
        ({"id": "a", "prompt": "x", "sampling": {"top_k": 2**40}}, "invalid_sampling", "top_k"),
        (
            {"id": "a", "prompt": "x", "sampling": {"logit_bias": {"the": 1}}},
            "invalid_sampling",
            "logit_bias",
        ),
        ({"id": "good", "prompt": "again"}, "duplicate_id", "'good' belongs to an earlier row"),
    ],
)
def test_a_bad_row_is_named_and_its_neighbours_untouched(tmp_path, line, kind, says):
    first, bad, last = rows_of(tmp_path, GOOD, line, {"id": "last", "prompt": "y"})
    assert (first.id, first.work) == ("good", PromptWork("hello", SamplingParams()))
    assert (last.id, last.work) == ("last", PromptWork("y", SamplingParams()))
    assert isinstance(bad, BadRow)
    assert bad.type == kind
    assert says in bad.message
    assert bad.record.line == 2
    json.dumps(bad.result).encode()


def test_a_template_makes_a_prompt_of_a_row_s_columns(tmp_path):
    row = {"id": 5, "shop": "été", "on": True, "list": ["é", 1], "size": 1.5, "other": None}
    lines = [row, row | {"id": "own", "sampling": {"max_tokens": 3}}]
    lines += [row | {"id": "gone", "size": None}, {"shop": "x", "on": 0, "list": "", "size": "y"}]
    template = '{{"{shop}"}} {on}{list}, {size} {shop} {id}'
    first, own, gone, bare = rows_of(tmp_path, *lines, template=template)
    assert first.work == PromptWork('{"été"} true["é", 1], 1.5 été 5', SamplingParams())
    assert own.work.sampling.max_tokens == 3 and own.work.prompt.endswith("own")
    assert gone.message.startswith("the row has no 'size', which job.template puts")
    assert bare.message.startswith("the row has no 'id', which")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("Shop: {shop", "expected '}'"),
        ('{"shop": {shop}}', 'has {"shop": {shop}}: want names'),
        ("{shop!r}", "has {shop!r}: want names of columns in braces"),
        ("{}", "has {}: want"),
        ("shop", "has no column"),
    ],
)
def test_a_template_that_names_no_columns_is_refused(template, says):
    with pytest.raises(ValueError) as refused:
        GenerateMode(SamplingParams(), template)
    assert says in str(refused.value) and "as in 'Shop: {shop}.'" in str(refused.value)


def test_ids_of_error_rows(tmp_path):
    lines = (b"{", {"id": "known", "prompt": ""}, {"id": 4, "promt": "x"}, {"promt": "x"})
    assert [row.id for row in rows_of(tmp_path, *lines)] == ["1", "known", 4, "4"]


def test_ids_seen_before_are_found_in_a_table_that_grows():
    ids = IdSet()
    assert all(ids.add(f"row-{i}") for i in range(5_000))
    assert not any(ids.add(f"row-{i}") for i in range(5_000))
    assert ids.add(7) and not ids.add("7")
    assert 8 * len(ids._slots) <= 22 * 5_001
