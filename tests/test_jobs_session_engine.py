"""Prompts through the real engine: stop strings, several answers, shared beginnings and aborts at
once. Every answer is what a whole forward after the other gives, cut as its rules say.
"""

import random

import pytest
from engine_reference import Reference, tiny

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.jobs.session import Session, expand

MODEL, LEAVES = tiny("llama", layers=1)
MAX_LEN = 48
SECTION = EngineSection(
    rows=3, page_size=4, num_pages=30, prefill_chunk=32, decode_block=5, max_len=MAX_LEN
)
PROGRAMS = {}  # of both engines
SHARED = [5, 9, 11, 7, 3, 3, 20, 21, 22]
EOS = 2


class Letters:
    """Each id is one character, but every seventh spells half of one."""

    control_ids = frozenset({EOS})
    leading_space = False

    def encode(self, text, add_special=True):
        return list(text.encode())

    def id_to_bytes(self, token_id):
        if token_id % 7 == 6:
            return "é".encode()[token_id % 2 :][:1]
        return chr(97 + token_id % 23).encode()


def spelled(ids):
    return b"".join(Letters().id_to_bytes(i) for i in ids if i != EOS).decode(errors="replace")


def expected(reference, ids, params):
    """(text, finish reason) of one answer."""
    whole = reference.answer(ids, params, max_len=MAX_LEN)
    text = spelled(whole.token_ids)
    ends = [(text.find(s) + len(s), -len(s), s) for s in params.stop if s in text]
    if not ends:
        return text, whole.finish_reason
    return text[: text.find(min(ends)[2])], "stop"


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_are_those_of_prompts_alone(seed):
    draw, reference = random.Random(seed), Reference(MODEL, LEAVES, (EOS,))
    engine = Engine(MODEL, LEAVES, section=SECTION, eos_ids=(EOS,))
    engine.runner.require(SampleSpec(stochastic=True))
    engine.runner.programs.compiled = PROGRAMS
    session, asked, found, cut = Session(engine, Letters()), {}, {}, set()
    for number in range(24):
        ids = SHARED[: draw.choice([0, 4, 8, 9])] + [draw.randrange(3, 70) for _ in range(4)]
        stop = tuple(chr(97 + draw.randrange(23)) + "éb"[:k] for k in draw.sample([0, 0, 1], 2))
        params = SamplingParams(
            n=draw.choice([1, 1, 3]),
            stop=draw.choice([(), stop]),
            max_tokens=draw.choice([1, 7, 30]),
            temperature=draw.choice([0.0, 1.0]),
            seed=number,
        )
        session.add(f"{number}", ids, params)
        asked[f"{number}"] = ids, params
        for delta in session.step() if number % 3 == 2 else ():
            if delta.completion:
                found[delta.key] = delta.completion
        if number % 8 == 7:  # a session that is closed midway leaves nothing to the others
            other = Session(engine, Letters())
            other.add(f"other {number}", SHARED, SamplingParams(n=2, max_tokens=30))
            other.close()
    found |= {delta.key: delta.completion for delta in session.deltas() if delta.completion}
    for key, (ids, params) in asked.items():
        singles = [expected(reference, ids, single) for single in expand(params)]
        got = [(choice.text, choice.finish_reason) for choice in found[key].choices]
        assert got == singles, key
        cut |= {key for text, reason in singles if reason == "stop" and params.stop}
    assert len(cut) > 3
    assert engine.stats()["prefix_hit_tokens"] > 0
    pool = engine.scheduler.load
    assert (pool.running, pool.waiting, pool.free_pages) == (0, 0, pool.pages)
