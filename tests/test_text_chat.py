"""Chat templates: the text that transformers renders, and errors that name the place."""

import json
from pathlib import Path

import pytest

from lepton_jax.text import ChatTemplateError
from lepton_jax.text.chat_template import render

CASES = json.loads((Path(__file__).parent / "fixtures" / "text" / "chat.json").read_text())["cases"]
USER = {"role": "user", "content": "Hi"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("case", CASES)
def test_renders_what_transformers_renders(case):
    text = render(case["template"], case["messages"], tools=case["tools"], **case["variables"])
    assert text == case["text"]


def test_an_answer_follows_unless_told_otherwise():
    template = "{% if add_generation_prompt %}go{% endif %}"
    assert render(template, [USER]) == "go"
    assert render(template, [USER], add_generation_prompt=False) == ""


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(PLAIN, [{"role": "user", "content": parts}]) == "user: ab\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hi", "messages is a str"),
        (USER, "messages is a dict"),
        (["Hi"], r"messages\[0\] is a str"),
        (
            [USER, {"role": "wizard", "content": "x"}],
            r"messages\[1\].role is 'wizard'; allowed: sys",
        ),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role is \['user'\]"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is a int"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            r"content\[0\] is of type 'image'; only text",
        ),
        ([USER | {"extra": object()}], r"messages\[0\] is not plain JSON"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(PLAIN, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles: user.*roles must alternate"),
        ("a\n{% if %}", "line 2 is not valid jinja"),
        ("{{ 'a' + 1 }}", "refuses the messages"),
        ("{{ messages[7].content.x }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
        ("{{ 1 / 0 }}", "refuses the messages"),
        ("{% for i in range(99999999) %}{% endfor %}", "refuses the messages"),
    ],
)
def test_templates_that_fail_say_so(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(template, [USER])
