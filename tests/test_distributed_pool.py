"""Many engines as one: the answers of one engine whatever happens to the replicas."""

import dataclasses
import random
import time

import jax
import numpy as np
import pytest
from engine_reference import tiny
from jobs_fakes import ByteTokenizer, FakeEngine, job_config, run_job

from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection, JobSection, MeshSection, RunConfig, SamplingParams
from lepton_jax.distributed.local import device_groups, local_pool
from lepton_jax.distributed.pool import Pool, ReplicasLost
from lepton_jax.distributed.replicas import ThreadReplica
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.protocol import Limits
from lepton_jax.engine.scored import Scoring
from lepton_jax.jobs.session import Session

PARAMS = SamplingParams(max_tokens=30)


class Remote(FakeEngine):
    """A fake engine as a replica has it; it dies after so many beats, or is slow."""

    def __init__(self, *, dies=None, naps=None, **sizes):
        super().__init__(**sizes)
        sizes = dict(page_size=4, num_pages=1000, num_layers=2)
        self.limits = Limits(vocab_size=257, max_len=self.max_len, **sizes)
        self._dies, self._naps = dies, naps
        self.served = []

    def add_request(self, request_id, prompt_ids, params):
        super().add_request(request_id, prompt_ids, params)
        self.served.append((self.steps, request_id))

    def forget(self):
        super().forget()
        self.served.append("forget")

    def step(self):
        if self._dies is not None and self.steps >= self._dies:
            raise RuntimeError("out of order")
        if self._naps:
            time.sleep(self._naps.random() / 500)
        return super().step()

    def close(self):
        pass


def pool_of(*engines, lockstep=True, **options):
    replicas = [ThreadReplica(f"{n}", e, slots=2) for n, e in enumerate(engines)]
    return Pool(replicas, lockstep=lockstep, **options)


def test_a_pool_says_the_pages_of_each_replica():
    engines = Remote(), Remote()
    engines[1].limits = dataclasses.replace(engines[1].limits, num_pages=30)
    pool = pool_of(*engines)
    assert pool.pages == (1000, 30)
    pool.close()


def texts(count):
    return {f"{n}": "row " + "x" * (n * 7 % 23) for n in range(count)}


def answers(pool, rows, params=PARAMS):
    session = Session(pool, ByteTokenizer())
    for key, text in rows.items():
        session.add(key, text, params)
    done = [delta for delta in session.deltas() if delta.completion]
    assert len(done) == len(rows) == len({delta.key for delta in done})
    assert not pool.has_work
    return {delta.key: delta.completion.text for delta in done}


@pytest.mark.parametrize("lockstep", [True, False])
def test_all_rows_are_answered_once_and_every_replica_works(lockstep):
    engines = [Remote(), Remote(), Remote()]
    rows = texts(40)
    assert answers(pool_of(*engines, lockstep=lockstep), rows) == rows
    assert all(engine.served for engine in engines)
    assert sum(len(engine.served) for engine in engines) == 40


@pytest.mark.parametrize("lockstep", [True, False])
def test_the_rows_of_dead_replicas_begin_anew_elsewhere(lockstep, caplog):
    engines = [Remote(dies=3), Remote(), Remote(dies=7)]
    pool = pool_of(*engines, lockstep=lockstep)
    rows = texts(40)
    assert answers(pool, rows) == rows
    report = pool.stats()["pool"]
    assert [replica["died"] for replica in report["replicas"]] == [True, False, True]
    assert sum(replica["rows"] for replica in report["replicas"]) == 40
    assert "replica 0 is dead" in caplog.text and "out of order" in caplog.text


def test_what_had_come_of_a_lost_row_is_void():
    pool = pool_of(Remote(dies=2, block=2), Remote(block=2))
    pool.add_request("a/0", list(b"abcdefgh"), PARAMS)
    pool.add_request("b/0", list(b"abcdefgh"), PARAMS)
    seen = {"a/0": [], "b/0": []}
    restarted = 0
    while pool.has_work:
        for output in pool.step():
            if output.restarted:
                restarted += 1
                assert seen[output.request_id]
                seen[output.request_id] = []
            seen[output.request_id] += output.token_ids
    assert restarted == 1
    assert [bytes(ids[:-1]) for ids in seen.values()] == [b"abcdefgh"] * 2


def test_without_replicas_there_is_no_answer():
    pool = pool_of(Remote(dies=1), Remote(dies=2))
    with pytest.raises(ReplicasLost, match="all replicas are dead; the last, 1: RuntimeError: out"):
        answers(pool, texts(10))


def test_requests_are_refused_at_once():
    pool = pool_of(Remote(max_len=20), Remote(max_len=30))
    assert pool.max_len == 20
    with pytest.raises(ValueError, match="25 tokens, but engine.max_len=20"):
        pool.add_request("a", [1] * 25, PARAMS)
    with pytest.raises(ValueError, match="the prompt has token id 300, which is outside"):
        pool.add_request("a", [300], PARAMS)
    pool.add_request("a", [1], PARAMS)
    with pytest.raises(ValueError, match="'a' is already running"):
        pool.add_request("a", [1], PARAMS)
    with pytest.raises(ValueError, match="requests are open"):
        pool.forget()
    pool.abort("a")
    assert not pool.has_work
    pool.forget()


@pytest.mark.parametrize("lockstep", [True, False])
def test_stop_texts_end_rows_on_their_replicas(lockstep):
    engines = [Remote(), Remote()]
    pool = pool_of(*engines, lockstep=lockstep)
    params = SamplingParams(max_tokens=60, stop=("END",))
    rows = {f"{n}": "ab END and much more of it that nobody needs" for n in range(8)}
    assert set(answers(pool, rows, params).values()) == {"ab "}
    pool.add_request("last", [1], PARAMS)
    while pool.has_work:
        pool.step()
    aborted = sum(len(engine.aborted) for engine in engines)
    assert aborted >= 6  # but for those that were told while the last beats ran


def test_lockstep_deals_alike_however_long_beats_take():
    runs = []
    for seed in (1, 2):
        draw = random.Random(seed)
        engines = [Remote(naps=draw), Remote(naps=draw), Remote(naps=draw)]
        pool = pool_of(*engines)
        answers(pool, texts(30))
        pool.forget()
        answers(pool, texts(30))
        runs.append([engine.served for engine in engines])
    assert runs[0] == runs[1]
    for served in runs[0]:  # and what came before doesn't matter
        first, second = served[: served.index("forget")], served[served.index("forget") + 1 :]
        assert [row for _, row in first] == [row for _, row in second]


def test_a_slow_replica_gets_less():
    class Slow(Remote):
        def step(self):
            time.sleep(0.02)
            return super().step()

    class Quick(Remote):
        def step(self):
            time.sleep(0.002)
            return super().step()

    slow, quick = Slow(), Quick()
    pool = pool_of(slow, quick, lockstep=False)
    rows = texts(60)
    assert answers(pool, rows) == rows
    assert len(slow.served) < len(quick.served) / 3


def test_a_stalled_replica_does_not_hold_the_job(caplog):
    class Stuck(Remote):
        def step(self):
            time.sleep(30)

    pool = pool_of(Stuck(), Remote(), lockstep=False, stall_after=0.3)
    began = time.perf_counter()
    assert answers(pool, texts(20)) == texts(20)
    assert time.perf_counter() - began < 10


def test_a_job_gives_the_file_of_one_engine(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"id": {n}, "prompt": "row {n}"}}\n' for n in range(300)))
    one, _ = run_job(job_config(source, tmp_path / "one.jsonl"))
    pool = pool_of(Remote(), Remote(dies=20), Remote())
    many, tally = run_job(job_config(source, tmp_path / "many.jsonl"), pool)
    assert many.read_bytes() == one.read_bytes()
    assert (tally.rows, tally.errors) == (300, 0)


def test_real_engines_on_slices_of_the_devices():
    model, leaves = tiny("llama", layers=1)
    compress = compressor(preset_rules("int8"), model.specs)
    pairs = zip(model.specs.items(), leaves, strict=True)
    leaves = tuple(compress(path, spec, leaf) for (path, spec), leaf in pairs)
    section = EngineSection(rows=2, page_size=8, prefill_chunk=64, decode_block=4, max_len=64)
    one = Engine(model, leaves, section=section)
    config = RunConfig(
        engine=section, mesh=MeshSection(data=2, model=2), job=JobSection(exact=True)
    )
    groups = device_groups(config.mesh)
    engines = [Engine(model, leaves, section=section, devices=group) for group in groups]
    pool = local_pool(engines, config)
    draw = np.random.default_rng(0)
    prompts = {f"{n}/0": draw.integers(3, 70, 4 + n).tolist() for n in range(6)}
    outputs, scores = [], []
    for engine in (one, pool):
        got = {key: [] for key in prompts}
        for key, ids in prompts.items():
            engine.add_request(key, ids, SamplingParams(max_tokens=9, ignore_eos=True))
        engine.add_scoring("score/0", prompts["5/0"][:-1], Scoring(targets=((7,),)))
        while engine.has_work:
            for output in engine.step():
                if output.scored:
                    scores.append(float(output.scored.logprobs[0, 0]))
                else:
                    got[output.request_id] += output.token_ids
        outputs.append(got)
    assert outputs[0] == outputs[1] and scores[0] == pytest.approx(scores[1], abs=1e-4)
    stats = pool.stats()
    assert stats["generated_tokens"] == 6 * 9
    assert [replica["rows"] > 0 for replica in stats["pool"]["replicas"]] == [True, True]
    pool.close()


def test_counts_add_up_and_the_memory_is_that_of_the_largest_process():
    engines = [Remote(), Remote()]
    for engine, peak in zip(engines, (7, 5), strict=True):
        engine.stats = lambda peak=peak: {
            "device": "TPU v5 lite",
            "peak_memory_bytes": peak,
            "compile_cache_hits": 2,
            "decode_seconds": float(peak),
        }
    pool = pool_of(*engines)
    for n in range(4):
        pool.add_request(f"{n}", [1, 2, 3], PARAMS)
    while pool.has_work:
        pool.step()
    stats = pool.stats()
    pool.close()
    del stats["pool"]
    of_one = {"device": "TPU v5 lite", "peak_memory_bytes": 7, "decode_seconds": 7.0}
    assert stats == of_one | {"compile_cache_hits": 4}


def test_too_few_devices_are_named():
    assert len(device_groups(MeshSection(data=2, model=3))) == 2
    count = len(jax.local_devices())
    with pytest.raises(ValueError, match=f"mesh.data=5 .* need 10, and there are {count} .cpu"):
        device_groups(MeshSection(data=5, model=2))
