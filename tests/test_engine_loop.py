"""The engine with its real programs on tiny models, against `engine_reference.py`.

Whatever the batch, the chunks, the pages, the shared beginnings and the blocks: the same tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import Expected, Reference, tiny

from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.knobs import Knobs
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.packing import PrefillShape
from lepton_jax.engine.programs import LateCompileError
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.runner import Runner
from lepton_jax.kept_programs import KeptProgram
from lepton_jax.models.build import Model

MAX_LEN = 112
EOS = (2,)
MODEL, LEAVES = tiny("llama", layers=2)
VOCAB = MODEL.config.vocab_size
TIGHT = EngineSection(
    rows=4, page_size=4, num_pages=36, prefill_chunk=64, decode_block=4, max_len=MAX_LEN
)
PROGRAMS: dict[EngineSection, dict] = {}  # engines of equal sizes share what is compiled


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **fields})


LONG = ids(81, 1)
REQUESTS = {
    "greedy": (ids(5, 2), params(max_tokens=40)),
    "long": (LONG, params(max_tokens=20)),
    "begins as long": (LONG[:42] + ids(9, 3), params(logprobs=0)),
    "long again": (LONG, params(temperature=1.0, seed=3)),
    "drawn": (ids(9, 4), params(temperature=1.3, seed=1 << 40, max_tokens=30)),
    "nucleus": (ids(3, 5), params(temperature=1.1, top_k=30, top_p=0.8, min_p=0.01, seed=5)),
    "penalties": (
        LONG[:30],
        params(repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.5, max_tokens=30),
    ),
    "bias": (ids(6, 6), params(logit_bias={7: 0.6, 8: 0.5, 9: -100.0})),
    "logprobs": (ids(7, 7), params(logprobs=3)),
    "one token": (ids(8, 8), params(max_tokens=1)),
    "one drawn token": (ids(16, 9), params(max_tokens=1, temperature=2.0, seed=9)),
    "eos": (ids(4, 10), params(logit_bias={2: 3.0}, ignore_eos=False)),
    "eos ignored": (ids(4, 10), params(logit_bias={2: 3.0})),
    "no eos yet": (ids(4, 10), params(logit_bias={2: 3.0}, ignore_eos=False, min_tokens=5)),
    "end of space": (ids(MAX_LEN - 3, 11), params(max_tokens=50)),
    "penalties, drawn": (ids(5, 12), params(frequency_penalty=1.0, temperature=0.9, seed=2)),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Expected]:
    reference = Reference(MODEL, LEAVES, EOS)
    answers = {n: reference.answer(*r, max_len=MAX_LEN) for n, r in REQUESTS.items()}
    # An id in the midst of an answer as a stop id, alone and with a minimum length behind it.
    stop = answers["greedy"].token_ids[6]
    prompt, least = REQUESTS["greedy"][0], answers["greedy"].token_ids.index(stop) + 3
    REQUESTS["stop id"] = (prompt, params(stop_token_ids=(stop,)))
    REQUESTS["stop id later"] = (prompt, params(stop_token_ids=(stop,), min_tokens=least))
    for name in ("stop id", "stop id later"):
        answers[name] = reference.answer(*REQUESTS[name], max_len=MAX_LEN)
    return answers


def make(section: EngineSection) -> Engine:
    engine = Engine(MODEL, LEAVES, section=section, eos_ids=EOS)
    engine.runner.programs.compiled = PROGRAMS.setdefault(section, {})
    return engine


def collect(outputs: list[StepOutput], into: dict[str, StepOutput]) -> None:
    for new in outputs:
        old = into.get(new.request_id, StepOutput(new.request_id, []))
        assert old.finish_reason is None, f"{new.request_id} ended twice"
        logprobs = None if new.logprobs is None else [*(old.logprobs or []), *new.logprobs]
        into[new.request_id] = StepOutput(
            new.request_id, old.token_ids + new.token_ids, logprobs, new.finish_reason
        )


def drain(engine: Engine, into: dict[str, StepOutput], beats: int = 400) -> dict[str, StepOutput]:
    while engine.has_work:
        beats -= 1
        assert beats, "the engine goes on without an end"
        collect(engine.step(), into)
    pool = engine.scheduler._pools[0]
    assert pool.available == pool.num_pages - 1
    return into


def serve(engine: Engine, requests: dict) -> dict[str, StepOutput]:
    for name, request in requests.items():
        engine.add_request(name, *request)
    return drain(engine, {})


def check(got: dict[str, StepOutput], expected: dict[str, Expected]) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert (name, got[name].token_ids) == (name, want.token_ids)
        assert (name, got[name].finish_reason) == (name, want.finish_reason)
        check_logprobs(got[name], want, REQUESTS[name][1].logprobs)


def check_logprobs(got: StepOutput, want: Expected, tops: int | None) -> None:
    if tops is None:
        assert got.logprobs is None
        return
    assert len(got.logprobs) == len(want.token_ids)
    for (own, top), token, row in zip(got.logprobs, want.token_ids, want.logprobs, strict=True):
        assert own == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in top] == np.argsort(-row)[:tops].tolist()
        assert [p for _, p in top] == pytest.approx(np.sort(row)[::-1][:tops].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def tight() -> Engine:
    """Four rows on fewer pages than they want."""
    return make(TIGHT)


def with_knobs(engine: Engine, **knobs) -> None:
    most = Knobs(TIGHT.decode_block, TIGHT.prefill_chunk, TIGHT.rows)
    engine.scheduler.knobs = dataclasses.replace(most, **knobs)


def test_the_requests_show_what_they_are_meant_to(expected):
    ends = {name: answer.finish_reason for name, answer in expected.items()}
    assert {n for n, end in ends.items() if end == "stop"} == {
        "eos",
        "no eos yet",
        "stop id",
        "stop id later",
    }
    assert EOS[0] in expected["eos ignored"].token_ids[:-1]
    assert len(expected["end of space"].token_ids) == 3
    assert len(expected["no eos yet"].token_ids) > len(expected["eos"].token_ids)


def test_together_on_few_pages(tight, expected):
    with_knobs(tight)
    check(serve(tight, REQUESTS), expected)
    assert tight.stats()["preemptions"] > 0
    assert tight.stats()["prefix_hit_tokens"] >= 40


class Heard:
    """A listener that keeps all."""

    def __init__(self):
        self.beats, self.forgotten = [], 0

    def take(self, beat) -> None:
        self.beats.append(beat)

    def forget(self) -> None:
        self.forgotten += 1


def overheard(engine: Engine) -> tuple[dict[str, StepOutput], list]:
    """Outputs of all requests, and the beats that they took."""
    heard = Heard()
    engine.listen(heard)
    return serve(engine, REQUESTS), heard.beats


def test_listeners_hear_of_every_beat(expected):
    engine, heard = make(TIGHT), Heard()
    engine.listen(heard)
    got = serve(engine, REQUESTS)
    stats, beats = engine.stats(), heard.beats

    def total(name):
        return sum(getattr(beat, name) for beat in beats)

    pairs = dict(steps="decode_steps", tokens="generated_tokens", decode_tokens="decode_tokens")
    same = ("prefill_tokens", "preemptions", "prefix_hit_tokens")
    for ours, theirs in (pairs | dict(zip(same, same, strict=True))).items():
        assert total(ours) == stats[theirs], ours
    for name in ("prefill_seconds", "decode_seconds", "gap_seconds"):
        assert total(name) == pytest.approx(stats[name]), name
    assert total("prefill_places") - total("prefill_tokens") == stats["prefill_padding"]
    idle = sum(beat.row_places * beat.steps - beat.rounds for beat in beats)
    assert idle == stats["decode_padding"]
    reasons = [output.finish_reason for output in got.values()]
    assert (total("ended"), total("stopped")) == (len(reasons), reasons.count("stop"))
    assert beats[0].slots == 4 and beats[0].waiting == len(REQUESTS) - beats[0].running > 0
    assert (beats[-1].running, beats[-1].waiting, beats[-1].pages) == (0, 0, 35)
    assert beats[-1].free_pages == 35
    assert not heard.forgotten
    engine.forget()
    assert heard.forgotten == 1


def test_preempted_rows_with_penalties_know_their_own_outputs(tight):
    with_knobs(tight)
    reference, before = Reference(MODEL, LEAVES, EOS), tight.stats()["preemptions"]
    asked = params(presence_penalty=1.0, frequency_penalty=0.4, max_tokens=60)
    requests = {f"long penalties {n}": (ids(12, 20 + n), asked) for n in range(3)}
    got = serve(tight, requests)
    assert tight.stats()["preemptions"] > before
    for name, request in requests.items():
        assert got[name].token_ids == reference.answer(*request, max_len=MAX_LEN).token_ids


def test_a_block_ends_with_its_last_row(tight, expected):
    with_knobs(tight)
    steps = len(expected["stop id"].token_ids) - 1
    assert steps % TIGHT.decode_block
    before = tight.stats()["decode_steps"]
    serve(tight, {"stop id": REQUESTS["stop id"]})
    assert tight.stats()["decode_steps"] - before == steps


def test_one_by_one(tight, expected):
    with_knobs(tight, live_rows=1)
    got, beats = overheard(tight)
    check(got, expected)
    assert max(beat.running for beat in beats) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_other_blocks_and_chunks(tight, expected, steps):
    with_knobs(tight, decode_block=steps, prefill_chunk=32, live_rows=3)
    got, beats = overheard(tight)
    check(got, expected)
    most = [max(getattr(b, name) for b in beats) for name in ("steps", "prefill_tokens", "running")]
    assert most == [steps, 32, 3]


def test_each_block_copies_one_buffer_each_way(tight, expected):
    with_knobs(tight)
    calls = []

    def watched(program):
        def call(*arguments):
            leaves = jax.tree.leaves(arguments)
            calls.append([a for a in leaves if not isinstance(a, jax.Array)])
            result = program(*arguments)
            assert isinstance(result[-1], jax.Array)
            return result

        return call

    own = tight.runner.programs.compiled
    tight.runner.programs.compiled = {shape: watched(program) for shape, program in own.items()}
    try:
        serve(tight, {"greedy": REQUESTS["greedy"]})
    finally:
        tight.runner.programs.compiled = own
    assert len(calls) == 1 + -(-39 // TIGHT.decode_block)
    assert [(len(host), host[0].ndim, host[0].dtype) for host in calls] == [
        (1, 1, np.int32) for _ in calls
    ]


def test_the_next_block_is_dispatched_before_the_last_is_read(tight, monkeypatch):
    with_knobs(tight)
    calls = []

    def note(name):
        function = getattr(tight.runner, name)

        def noted(*given):
            calls.append(name)
            return function(*given)

        monkeypatch.setattr(tight.runner, name, noted)

    note("dispatch")
    note("read")
    serve(tight, {"greedy": REQUESTS["greedy"]})
    beats = calls.count("read")
    assert beats > 5
    assert calls == ["dispatch", *["dispatch", "read"] * (beats - 1), "read"]


def test_a_sample_does_not_depend_on_batch_mates(tight, expected):
    with_knobs(tight)
    for mates in ("bias", "nucleus"), ("penalties", "eos", "greedy"):
        chosen = {name: REQUESTS[name] for name in (*mates, "drawn")}
        assert serve(tight, chosen)["drawn"].token_ids == expected["drawn"].token_ids


def test_abort_of_waiting_running_and_leaving_requests(tight, expected):
    with_knobs(tight)
    for name, request in REQUESTS.items():
        tight.add_request(name, *request)
    got, aborted = {}, ["greedy", "penalties, drawn", "drawn", "one token", "unknown"]
    for name in aborted:
        tight.abort(name)
        before = set(got)
        collect(tight.step(), got)
        assert name not in set(got) - before
    kept = {name: answer for name, answer in expected.items() if name not in aborted}
    drain(tight, got)
    check({name: got[name] for name in kept}, kept)
    assert got.keys() - kept.keys() <= {"drawn", "one token"}  # what came out before the abort


def test_other_pages_and_no_prefix_cache(expected):
    section = EngineSection(
        rows=2, page_size=16, prefill_chunk=64, decode_block=7, max_len=MAX_LEN, prefix_cache=False
    )
    engine = make(section)
    check(serve(engine, REQUESTS), expected)
    assert engine.stats()["preemptions"] == engine.stats()["prefix_hit_tokens"] == 0


def test_strict_runner_refuses_what_was_not_warmed_up():
    engine = Engine(MODEL, LEAVES, section=TIGHT, strict=True)
    plain = SamplingParams(max_tokens=6)
    engine.warm_up([(5, plain), (6, plain)])
    serve(engine, {"a": (ids(5, 1), plain), "b": (ids(6, 2), plain)})
    assert engine.stats()["programs"] == 2 and engine.stats()["late_compiles"] == 0
    PROGRAMS.setdefault(TIGHT, {}).update(engine.runner.programs.compiled)
    engine.add_request("c", ids(5, 1), SamplingParams(temperature=1.0))
    with pytest.raises(LateCompileError, match="PrefillShape.*stochastic=True.*not part of"):
        engine.step()


def test_programs_grow_while_rows_run(expected):
    engine, got = make(TIGHT), {}
    early = ["greedy", "long"]
    for name in early:
        engine.add_request(name, *REQUESTS[name])
    assert engine.runner.spec == SampleSpec()
    for _ in range(4):
        collect(engine.step(), got)
    assert len(got["greedy"].token_ids) > 4
    for name in REQUESTS:
        if name not in early:
            engine.add_request(name, *REQUESTS[name])
    check(drain(engine, got), expected)


@pytest.mark.parametrize(("num_pages", "preempts"), [(60, False), (30, True)])
def test_warm_up_counts_what_preempted_rows_compute_again(monkeypatch, num_pages, preempts):
    section = dataclasses.replace(TIGHT, num_pages=num_pages, prefill_chunk=512)
    monkeypatch.setattr(Runner, "_fetch", lambda self, shape: KeptProgram(None, 0.0))
    engine = Engine(MODEL, LEAVES, section=section)
    engine.warm_up([(6, SamplingParams(max_tokens=90))] * 2)
    shapes = engine.runner.programs.compiled
    largest = max(shape.tokens for shape in shapes if isinstance(shape, PrefillShape))
    assert (largest >= 2 * 96) == preempts


def test_bad_requests_are_refused_and_leave_no_trace(tight):
    bad = [
        ("the prompt has token id 72, which is outside the model's voc.* of 72", [5, VOCAB], {}),
        ("sampling.stop_token_ids has token id 72", [5], {"stop_token_ids": [VOCAB]}),
        ("sampling.logit_bias has token id 72", [5], {"logit_bias": {VOCAB: 1.0}}),
        ("the prompt has token id -1, which is outside", [-1], {}),
        ("no tokens", [], {}),
        (f"{MAX_LEN} tokens, but engine.max_len={MAX_LEN}", ids(MAX_LEN, 1), {}),
    ]
    spec = tight.runner.spec
    for message, prompt, fields in bad:
        with pytest.raises(ValueError, match=message):
            tight.add_request("bad", prompt, SamplingParams(**fields))
    assert tight.runner.spec == spec and not tight.has_work
    tight.add_request("twice", [5], SamplingParams())
    with pytest.raises(ValueError, match="'twice' is already running"):
        tight.add_request("twice", [5], SamplingParams())
    tight.abort("twice")
    assert not tight.has_work


def test_broken_logits_end_a_row_with_an_error(tight):
    broken = dict(zip(MODEL.specs, LEAVES, strict=True))
    broken["final_norm"] *= jnp.nan
    engine = Engine(MODEL, tuple(broken.values()), section=TIGHT, eos_ids=EOS)
    engine.runner.spec, engine.runner.programs.compiled = tight.runner.spec, PROGRAMS[TIGHT]
    got = serve(engine, {"a": REQUESTS["greedy"], "b": REQUESTS["one token"]})
    assert got == {name: StepOutput(name, [], None, "error") for name in ("a", "b")}


def check_greedy(model: Model, leaves: tuple, **fields) -> None:
    section = dataclasses.replace(TIGHT, rows=2, prefill_chunk=32, **fields)
    engine, reference = Engine(model, leaves, section=section), Reference(model, leaves)
    requests = {str(n): (ids(25 * n, n), SamplingParams(max_tokens=12)) for n in (1, 2, 3)}
    got = serve(engine, requests)
    for name, request in requests.items():
        assert got[name].token_ids == reference.answer(*request, max_len=MAX_LEN).token_ids


@pytest.mark.parametrize("preset", ["int8", "w8a8"])
def test_quantized_leaves(preset):
    model, leaves = tiny("llama", layers=1)
    compress = compressor(preset_rules(preset), model.specs)
    pairs = zip(model.specs.items(), leaves, strict=True)
    check_greedy(
        model,
        tuple(compress(path, spec, leaf) for (path, spec), leaf in pairs),
        kv_dtype="float32",
    )


def test_layers_with_windows():
    model, leaves = tiny("gemma3", layers=2)
    assert any(model.config.layer_windows) and not all(model.config.layer_windows)
    check_greedy(model, leaves)
