"""Windows of tokens from text: what is drawn, what the receipt says, which texts are refused."""

import datetime
import json

import numpy as np
import pytest

from lepton_jax.compression.calibration_data import (
    CALIBRATION_TEXT,
    HELD_OUT_TEXT,
    draw_windows,
    share_seen,
)
from lepton_jax.text import chat_template

BOS = 1000
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if tools %}<{{ tools[0].name }}>{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Characters:
    """A character an id, and perhaps bos in front."""

    def __init__(self, bos=False):
        self.bos = bos

    def encode(self, text, add_special=True):
        return [BOS] * (self.bos and add_special) + [ord(c) for c in text]

    def render_chat(self, messages, tools=None, **variables):
        values = {"bos_token": chr(BOS), "tools": tools} | variables
        return chat_template.render(TEMPLATE, messages, **values)


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_windows_are_consecutive_text_and_the_receipt_finds_them(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(20_000))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(text[i : i + 100] for i in range(0, 20_000, 100)))
    drawn = draw_windows(path, Characters(), windows=7, length=64, seed=3)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for window, (line, offset) in zip(drawn.tokens, drawn.receipt["starts"], strict=True):
        found = "".join(map(chr, window))
        assert found in whole
        assert "".join(lines[line - 1 :])[offset:].startswith(found)
    assert len({tuple(start) for start in drawn.receipt["starts"]}) == 7
    assert drawn.receipt["tokens_in_file"] == len(whole)


def test_all_windows_of_a_text_are_all_its_text(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ["abcdefg", "", "hij", "klmnopqrstu"])
    drawn = draw_windows(path, Characters(), windows=5, length=5)
    assert "".join(map(chr, drawn.tokens.reshape(-1))) == "abcdefg\n\nhij\nklmnopqrstu\n"
    assert drawn.receipt["starts"] == [[1, 0], [1, 5], [3, 1], [4, 2], [4, 7]]


def test_windows_of_conversations_are_the_same_on_each_day(tmp_path):
    asked = []

    class Dated(Characters):
        now = None

        def render_chat(self, messages, tools=None, **variables):
            asked.append(self.now)
            return super().render_chat(messages, tools, **variables)

    file, tokenizer = tmp_path / "chats.jsonl", Dated()
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "ab" * 20}]}) + "\n")
    draw_windows(file, tokenizer, windows=1, length=8)
    assert set(asked) == {datetime.datetime(2026, 1, 1)} and tokenizer.now is None


def test_conversations_are_rendered_by_the_chat_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    rows = [{"messages": chat, "tools": [{"name": "t"}]}, {"text": "d"}, {"messages": chat[:1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = draw_windows(path, Characters(bos=True), windows=1, length=34)
    assert drawn.tokens[0, 0] == BOS  # the only one
    assert "".join(map(chr, drawn.tokens[0, 1:])) == "[user]ab[assistant]c<t>d\n[user]ab"


def test_bos_stands_in_front_of_every_window(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ["x" * 50])
    drawn = draw_windows(path, Characters(bos=True), windows=5, length=10)
    assert np.all(drawn.tokens[:, 0] == BOS) and not np.any(drawn.tokens[:, 1:] == BOS)


def test_the_seed_decides_and_each_window_is_as_likely(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ["".join(map(chr, range(256, 456)))])
    draws = [draw_windows(path, Characters(), windows=4, length=10, seed=s) for s in range(300)]
    again = draw_windows(path, Characters(), windows=4, length=10, seed=7)
    np.testing.assert_array_equal(again.tokens, draws[7].tokens)
    counts = np.bincount([(d - 256) // 10 for w in draws for d in w.tokens[:, 0]], minlength=20)
    assert counts.min() > 30 and counts.max() < 95  # 60 each, 7.3 standard deviation


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "abc" * 10, "need 50 tokens, and the text has 30 "),
        ("a.jsonl", '{"text": "abc"}\n', "need 50 tokens, and the text has 4 "),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "abc"}\n', 'row 2 has no string "text" and no "mes'),
        ("a.jsonl", '["abc"]\n', 'row 1 has no string "text" and no "messages"'),
        ("a.jsonl", '{"messages": [{"role": "cat"}]}\n', r"row 1: messages\[0\].role is 'cat'"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "row 3 is not JSON"),
        ("a.txt", "ab\n\udcff\n", "line 2 is not UTF-8"),
    ],
)
def test_texts_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        draw_windows(tmp_path / name, Characters(), windows=5, length=10)
    assert str(tmp_path / name) in str(error.value)


def test_the_shipped_texts_are_long_and_share_nothing():
    texts = [path.read_text(encoding="utf-8") for path in (CALIBRATION_TEXT, HELD_OUT_TEXT)]
    assert len(texts[0]) > 300_000 and len(texts[1]) > 90_000
    long = [{line for line in text.splitlines() if len(line) > 80} for text in texts]
    assert not long[0] & long[1]


def test_shared_runs_of_32_tokens_are_counted_wherever_they_stand():
    ids = np.random.default_rng(0).integers(0, 2**31 - 1, 1000, np.int32)
    held_out = ids[:200].reshape(2, 100)
    seen = np.stack([ids[500:600], ids[600:700]])
    assert share_seen(held_out, seen) == 0
    seen[1, 3:43] = held_out[0, 50:90]
    assert share_seen(held_out, seen) == 40 / 200
    seen[0, 60:91] = held_out[1, :31]  # shorter than a run
    assert share_seen(held_out, seen) == 40 / 200
    assert share_seen(held_out, held_out[::-1]) == 1
    held_out[1, 10:60] = held_out[0, 10:60]  # what comes again is no passage but instructions
    seen[1] = held_out[0]
    assert share_seen(held_out[:, 10:60], seen) == 0
    assert share_seen(held_out[:, :31], held_out) == 0
