"""Chat templates: the text that transformers renders, and errors that name the place."""

import functools
import json
from pathlib import Path

import pytest

from lepton_jax.text import ChatTemplateError
from lepton_jax.text.chat_template import render

CASES = json.loads((Path(__file__).parent / "fixtures" / "text" / "chat.json").read_text())["cases"]
USER = {"role": "user", "content": "Hi"}
NESTED = functools.reduce(lambda inner, _: [inner], range(50_000), [])
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


CALLS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls|length }}:"
    "{% for c in m.tool_calls %}{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};"
    "{% endfor %}{% endfor %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def called(*arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_arguments_of_calls_are_objects_as_text_too():
    """OpenAI's clients have them as a text of JSON."""
    as_text = render(CALLS, [USER, called('{"city": "Zürich"}', "", '{"n": 1}')])
    assert as_text == "Hi 3:city=Zürich;n=1;"
    assert as_text == render(CALLS, [USER, called({"city": "Zürich"}, {}, {"n": 1})])
    for wrong in ('{"city": ', "[1]", "7", "[" * 9000):
        with pytest.raises(ChatTemplateError, match=r"messages\[1\].tool_calls\[1\].function.arg"):
            render(CALLS, [USER, called("{}", wrong)])
    with pytest.raises(ChatTemplateError, match=r"messages\[0\].tool_calls is a dict"):
        render(CALLS, [{"role": "assistant", "content": "x", "tool_calls": {"a": 1}}])


def test_keys_that_are_null_are_not_there():
    assert render(CALLS, [USER | {"tool_calls": None, "name": None}]) == "Hi "


def test_roles_that_a_template_does_not_know_have_their_older_names():
    messages = [{"role": role, "content": "x"} for role in ("developer", "user", "function")]
    old = "{% for m in messages %}{% if m.role in ['system', 'user', 'tool'] %}{{ m.role }} "
    old += "{% endif %}{% endfor %}"
    assert render(old, messages) == "system user tool "
    new = "{% for m in messages %}{% if m.role == \"developer\" or m.role == 'function' %}"
    assert render(new + "{{ m.role }} {% endif %}{% endfor %}", messages) == "developer function "


@pytest.mark.parametrize("attempt", ['("{0.__globals__}"|attr("format"))(raise_exception)',
                                     "raise_exception.__globals__"])  # fmt: skip
def test_templates_do_not_reach_beyond_their_data(attempt):
    try:
        text = render("{{ " + attempt + " }}", [USER])
    except ChatTemplateError:
        return
    assert text == ""  # what is unsafe is undefined


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
        ([USER | {"extra": NESTED}], r"messages\[0\] is not plain JSON"),
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
