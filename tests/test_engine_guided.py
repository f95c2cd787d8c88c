"""Guided rows through the real programs of a tiny model: whatever it would like to say, the answer
has the prescribed form, also beside free rows, cut in chunks, preempted, and with sampling rules.
"""

import dataclasses
import functools
import json
import pickle
import random
import re
import types
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from engine_reference import tiny
from jobs_fakes import Killed, job_config, run_job

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.distributed.pool import Pool
from lepton_jax.distributed.replicas import ThreadReplica
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.jobs import driver
from lepton_jax.jobs.rows import RowError
from lepton_jax.jobs.session import Session
from lepton_jax.models.build import abstract_model
from lepton_jax.text.constraints import ConstraintError, Grammar, guide_for

VOCAB = 98


def model_with_characters():
    """A random model whose vocabulary has room for ASCII, and its leaves."""
    config = dataclasses.replace(tiny("llama", layers=1)[0].config, vocab_size=VOCAB)
    model = abstract_model(dataclasses.replace(config, max_position=400), "float32", "float32")
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=spec.shape) / 4 for path, spec in model.specs.items()}
    return model, tuple(jnp.asarray(value, jnp.float32) for value in values.values())


MODEL, LEAVES = model_with_characters()
ROOMY = EngineSection(rows=4, page_size=8, num_pages=400, prefill_chunk=32, max_len=256)
TIGHT = EngineSection(rows=4, page_size=4, num_pages=34, prefill_chunk=8, max_len=128)
PROGRAMS: dict[EngineSection, dict] = {}
DRAWN = SampleSpec(stochastic=True, stop_ids=1, guided=1)  # programs of most tests here
FREE = dataclasses.replace(DRAWN, guided=0)  # its blocks are those of DRAWN: they have no masks
PENALIZED = dataclasses.replace(DRAWN, penalties=True, logprobs=2)  # and of those on few pages
NAMES = ("a", "id", "shop_name", "x y")
PATTERNS = ("^[a-f]{2,4}$", "^\\d\\d-\\d$", "^(ab|c)$")
SCHEMAS = 200


class Characters:
    """Ids 0 to 2 are none of a text, the others spell one ASCII character each."""

    source, vocab_size, bos_id, eos_ids = "characters", VOCAB, None, (2,)
    control_ids, leading_space, chat_template = frozenset({0, 1, 2}), False, None

    def encode(self, text, add_special=True):
        return [3 + ord(c) - 32 for c in text if 32 <= ord(c) < 127]

    def id_to_bytes(self, token_id):
        return bytes([32 + token_id - 3]) if token_id > 2 else b"<%d>" % token_id


TOKENIZER = Characters()


def guided(engine):
    """The engine, which can make guides now."""
    engine.guide_with(functools.partial(guide_for, TOKENIZER))
    return engine


def make(section=ROOMY, spec=DRAWN):
    engine = guided(Engine(MODEL, LEAVES, section=section, eos_ids=TOKENIZER.eos_ids))
    engine.runner.programs.compiled = PROGRAMS.setdefault(section, {})
    engine.runner.require(spec)
    return engine


def answers(asked, section=ROOMY, engine=None):
    """Choices of each (prompt ids, params)."""
    session = Session(engine or make(section), TOKENIZER)
    for number, (prompt, params) in enumerate(asked):
        session.add(str(number), prompt, params)
    done = {d.key: d.completion for d in session.deltas() if d.completion}
    return [done[str(number)] for number in range(len(asked))]


def ids(seed, count=5):
    return np.random.default_rng(seed).integers(3, TOKENIZER.vocab_size, count).tolist()


def random_schema(rng, depth=0):
    """A schema whose answers are short, however a model wanders."""
    kinds = ["boolean", "null", "enum", "const", "string", "integer", "pattern"]
    kinds += ["object", "array", "anyOf"] * (depth < 2)
    kind = rng.choice(kinds)
    if kind == "enum":
        return {"enum": rng.sample(["red", "blue", 3, 4.5, None, True, "x y", ""], 3)}
    if kind == "const":
        return {"const": rng.choice(["yes", 7, [1, 2], {"k": False}])}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 900)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        most = rng.randint(1, 3)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": rng.randint(0, most), "maxItems": most}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {"type": kind}


HAND_MADE = [
    {"type": "object", "properties": {"n": {"enum": [1.5, -2e3]}}, "required": ["n"]},
    {"$defs": {"p": {"enum": ["u", "v"]}}, "type": "array", "items": {"$ref": "#/$defs/p"}}
    | {"minItems": 2, "maxItems": 2},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False}
    | {"minItems": 2},
    {"type": "string", "format": "date"},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"const": 1}}}}}
    | {"required": ["a"], "additionalProperties": False},
]


def test_json_is_of_its_schema_every_time():
    rng = random.Random(5)
    schemas = HAND_MADE + [random_schema(rng) for _ in range(SCHEMAS - len(HAND_MADE))]
    asked = []
    for number, schema in enumerate(schemas):
        warm = {"temperature": 1.5, "seed": number} if number % 2 else {}
        asked.append((ids(number), SamplingParams(json_schema=schema, max_tokens=250, **warm)))
    found = answers(asked)
    assert {answer.finish_reason for answer in found} == {"stop"}
    for schema, answer in zip(schemas, found, strict=True):
        jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("regex", [r"[a-c]{3,5} \d{1,3}", r"(yes|no)(, sir)?", r"x+y{2}|z"])
def test_the_whole_answer_matches_its_regular_expression(regex):
    asked = [
        (ids(seed), SamplingParams(regex=regex, temperature=1.0, seed=seed, max_tokens=300))
        for seed in range(12)
    ]
    found = answers(asked)
    for answer in found:
        if answer.finish_reason == "stop":
            assert re.fullmatch(regex, answer.text)
    assert sum(answer.finish_reason == "stop" for answer in found) >= 11
    assert len({answer.text for answer in found}) > 1


def test_a_choice_is_decided_by_the_letters_that_differ():
    choices = ("positive answer", "negative answer", "negative")
    engine = make()
    (answer,) = answers([(ids(1), SamplingParams(choices=choices))], engine=engine)
    assert answer.text in choices and answer.finish_reason == "stop"
    assert engine.runner.timings.decode_steps == 0
    (answer,) = answers([(ids(1), SamplingParams(choices=choices[:2]))], engine=engine)
    assert answer.text in choices
    # The first letter decides; the others must follow and cost no step.
    assert engine.stats()["generated_tokens"] >= len(answer.text) > 1


def test_forced_tokens_are_the_ones_that_the_model_would_be_asked_for():
    """Without log-probabilities what must follow isn't sampled, with them it is: the same text."""
    schema = {"enum": ["abcdef", "abcxyz", "q"]}
    for seed in range(6):
        fields = {"json_schema": schema, "temperature": 2.0, "seed": seed}
        asked = [
            (ids(seed), SamplingParams(**fields)),
            (ids(seed), SamplingParams(**fields, logprobs=2)),
        ]
        forced, sampled = answers(asked, engine=make(TIGHT, PENALIZED))
        assert sampled.logprobs and len(sampled.logprobs) == len(sampled.token_ids)
        assert json.loads(forced.text) in schema["enum"]
        assert json.loads(sampled.text) in schema["enum"]


def test_free_rows_beside_guided_ones_are_not_changed():
    free = [(ids(seed), SamplingParams(max_tokens=12, ignore_eos=True)) for seed in range(6)]
    alone = answers(free, engine=make(spec=FREE))
    schema = {"type": "string", "minLength": 3, "maxLength": 9}
    guided = [(ids(9 + n), SamplingParams(json_schema=schema, n=2, seed=n)) for n in range(4)]
    mixed = answers([x for pair in zip(free, guided, strict=False) for x in pair] + free[4:])
    assert [mixed[n].token_ids for n in (0, 2, 4, 6, 8, 9)] == [a.token_ids for a in alone]
    for n in (1, 3, 5, 7):
        assert len(mixed[n].choices) == 2
        for choice in mixed[n].choices:
            jsonschema.validate(json.loads(choice.text), schema)


def test_rows_that_are_sent_away_for_pages_go_on_where_they_were():
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 10}}
    schema |= {"minItems": 9, "maxItems": 9}
    penalty = {"frequency_penalty": 0.4, "repetition_penalty": 1.2}
    asked = [
        (ids(n, 20), SamplingParams(json_schema=schema, max_tokens=60, **fields))
        for n, fields in enumerate([{}, penalty] * 3)
    ]
    engine = make(TIGHT, PENALIZED)
    found = answers(asked, engine=engine)
    assert engine.stats()["preemptions"] > 0
    alone = make(TIGHT, PENALIZED)
    for one, answer in zip(asked, found, strict=True):
        assert answer.token_ids == answers([one], engine=alone)[0].token_ids
        jsonschema.validate(json.loads(answer.text), schema)


def test_penalties_count_each_token_once():
    """With a mask that allows two letters, what penalties change can be told by hand: never twice
    the same letter where the penalty is larger than any difference of logits.
    """
    params = SamplingParams(regex="[ab]{8}", frequency_penalty=2.0, max_tokens=9)
    biased = SamplingParams(regex="[ab]{8}", frequency_penalty=0.0, max_tokens=9)
    plain, counted = (
        answers([(ids(3), asked)], engine=make(TIGHT, PENALIZED))[0] for asked in (biased, params)
    )
    assert abs(counted.text.count("a") - 4) <= abs(plain.text.count("a") - 4)


def test_a_limit_cuts_and_says_so():
    schema = {"type": "string", "minLength": 20, "maxLength": 30}
    (answer,) = answers([(ids(4), SamplingParams(json_schema=schema, max_tokens=6))])
    assert answer.finish_reason == "length" and len(answer.token_ids) == 6
    (answer,) = answers([(ids(4), SamplingParams(regex="abcdefgh", max_tokens=3))])
    assert (answer.text, answer.finish_reason) == ("abc", "length")


def test_stop_texts_end_guided_rows_too():
    (answer,) = answers([(ids(5), SamplingParams(regex="one two three", stop=(" t",)))])
    assert (answer.text, answer.finish_reason) == ("one", "stop")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"regex": "(a"}, "(?s)sampling.regex is not allowed.*unclosed group"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "foo"}}, "Invalid type: foo"),
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: \\["not"\\]'),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(fields, message):
    with pytest.raises(ConstraintError, match=message):
        Grammar.of(SamplingParams(**fields))
    with pytest.raises(RowError, match=message):
        answers([(ids(1), SamplingParams(**fields))])


def test_a_tokenizer_without_an_end_is_the_rows_problem():
    class Endless(Characters):
        eos_ids = ()

    asked = []
    engine = types.SimpleNamespace(add_request=lambda *a, **named: asked.append(a), abort=print)
    session = Session(engine, Endless())
    with pytest.raises(RowError, match="has no end-of-text id"):
        session.add("a", ids(1), SamplingParams(choices=("a", "b")))
    assert not asked and len(session) == 0


def test_an_answer_has_one_form():
    with pytest.raises(ValueError, match="nothing beside choices"):
        SamplingParams(choices=("a", "c"), regex="b")
    for wrong in ((1, 2), ("yes,no",), "one"):
        with pytest.raises(ValueError, match=r"choices=.* is not allowed: want two or more texts"):
            SamplingParams(choices=wrong)
    assert Grammar.of(SamplingParams()) is None


class Elsewhere(ThreadReplica):
    """A replica to which and from which only bytes go, as to another process."""

    here = False

    def beat(self, commands):
        beat = super().beat(pickle.loads(pickle.dumps(commands))).result()
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(beat)))
        return future


def test_replicas_elsewhere_hold_a_prescribed_form_too():
    schema = {"type": "array", "items": {"enum": ["ab", "ba", 7]}, "minItems": 2, "maxItems": 4}
    forms = [{"json_schema": schema, "n": 2}, {"regex": "[xy]{4}z"}, {"choices": ("so", "no")}, {}]
    asked = [
        (ids(n), SamplingParams(**forms[n % 4], temperature=1.0, seed=n, max_tokens=60))
        for n in range(8)
    ]
    replicas = [Elsewhere(f"{n}", make(), slots=4) for n in range(2)]
    found = answers(asked, engine=Pool(replicas, lockstep=True))
    assert [answer.choices for answer in found] == [a.choices for a in answers(asked)]
    for answer in found[::4]:
        for choice in answer.choices:
            jsonschema.validate(json.loads(choice.text), schema)


def test_an_engine_that_was_told_of_no_guides_refuses_such_rows():
    engine = Engine(MODEL, LEAVES, section=ROOMY, eos_ids=TOKENIZER.eos_ids)
    with pytest.raises(RowError, match="sampling.choices prescribes an answer.*guide_with"):
        answers([(ids(1), SamplingParams(choices=("a", "b")))], engine=engine)
    assert not engine.has_work


def test_two_devices_give_the_answers_of_one():
    schema = {"type": "array", "items": {"enum": ["ab", "ba", 7]}, "minItems": 3, "maxItems": 5}
    asked = [
        (ids(n), SamplingParams(json_schema=schema, temperature=n % 2, seed=n)) for n in range(4)
    ]
    section = dataclasses.replace(ROOMY, prefill_chunk=8)  # with one size of prefills
    engine = guided(Engine(MODEL, LEAVES, section=section, eos_ids=(2,), devices=jax.devices()[:2]))
    found = answers(asked, engine=engine)
    assert [answer.token_ids for answer in found] == [a.token_ids for a in answers(asked)]
    for answer in found:
        jsonschema.validate(json.loads(answer.text), schema)


def test_a_warm_up_compiles_all_that_guided_rows_need():
    long = "abcdefghijklmnopqrstuvwxyz" * 2
    regex = f"[xy]{long}[xy]"  # forced in the midst
    params = SamplingParams(regex=regex, temperature=1.0, max_tokens=60)
    workload = [(3, params)] * 4
    engine = guided(
        Engine(MODEL, LEAVES, section=ROOMY, eos_ids=(2,), workload=workload, strict=True)
    )
    engine.warm_up(workload)
    found = answers([(ids(n, 3), params) for n in range(4)], engine=engine)
    assert all(answer.text[1:-1] == long for answer in found)
    assert engine.stats()["late_compiles"] == 0 and engine.runner.timings.decode_steps == 0


def test_a_program_without_guided_rows_has_no_mask():
    engine = make(spec=FREE)
    answers([(ids(1), SamplingParams(max_tokens=3))], engine=engine)
    assert engine.runner.spec.guided == 0
    answers([(ids(1), SamplingParams(choices=("a", "b")))], engine=engine)
    assert engine.runner.spec.guided == -(-VOCAB // 32)
    decode = [s for s in engine.runner.programs.compiled if type(s).__name__ == "DecodeShape"]
    assert decode and all(shape.spec.guided == 0 for shape in decode)


def cramped():
    """An engine on few pages, whose programs stay the same when it forgets."""
    engine = make(TIGHT, PENALIZED)
    engine.runner.warm_up([], wait=False)
    return engine


class Mortal:
    """An engine that lives for so many beats."""

    def __init__(self, beats):
        self._engine, self._beats = cramped(), beats

    def step(self):
        self._beats -= 1
        if not self._beats:
            raise Killed
        return self._engine.step()

    def __getattr__(self, name):
        return getattr(self._engine, name)


def test_a_guided_job_that_is_cut_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_BLOCK", 2)
    rng, source = random.Random(9), tmp_path / "in.jsonl"
    rows = [{"id": n, "prompt": f"row {n}"} for n in range(14)]
    for row in rows[::3] + rows[1::3]:
        row["sampling"] = {"json_schema": random_schema(rng)}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = dict(max_tokens=60, temperature=1.0)
    config = job_config(source, tmp_path / "whole.jsonl", sampling=sampling)
    whole, tally = run_job(config, cramped(), tokenizer=TOKENIZER)
    assert tally.errors == 0
    config, cuts = job_config(source, tmp_path / "cut.jsonl", sampling=sampling), 0
    while True:
        try:
            cut, _ = run_job(config, Mortal(10 + 6 * cuts), tokenizer=TOKENIZER)
            break
        except Killed:
            cuts += 1
    assert cuts > 1
    assert cut.read_bytes() == whole.read_bytes()
