"""Cascades over two engines whose log-probabilities are known: the compressed one's are those of
the dense one with noise. What a job writes must be what each model says alone, after kills too.
"""

import dataclasses
import json
import zlib

import numpy as np
import pytest
from compress_makers import model_folder
from jobs_fakes import Killed, job_config, run_job
from test_jobs_score import Bytes, FakeScorer

from lepton_jax import LeptonEngine
from lepton_jax.config import (
    CascadeSection,
    CompressionSection,
    EngineSection,
    HostsSection,
    JobSection,
    MeshSection,
    PoolSection,
    RunConfig,
    SamplingParams,
    ScoringSection,
)
from lepton_jax.engine.cascade import CascadeEngine
from lepton_jax.jobs import driver
from lepton_jax.jobs.mode_for import mode_for
from lepton_jax.jobs.promise import fewest_rows
from lepton_jax.jobs.scoring import plain, score_all

AGREEMENT = 0.8
CALIBRATION = 2 * fewest_rows(AGREEMENT)
LABELS = ("good", "bad", "ugly")


class NoisyScorer(FakeScorer):
    """A compressed model: noise of up to 0.8 nats, and 4 in texts with a "!"; a rounding besides,
    which depends on all questions since it was new. Ends the process after so many beats.
    """

    def __init__(self, noise=0.8, rounding=1e-3, beats=10**9):
        super().__init__()
        self.noise, self.rounding, self.beats, self.since = noise, rounding, beats, 0

    def forget(self):
        self.since = 0

    def step(self):
        self.beats, self.since = self.beats - 1, self.since + 1
        if self.beats < 0:
            raise Killed
        ids, _ = self.open[next(iter(self.open))]
        (output,) = super().step()
        if output.scored is not None:
            table = output.scored.logprobs
            most = 5 * self.noise if ord("!") in ids else self.noise
            for place in np.ndindex(table.shape):
                seed = zlib.crc32(repr((ids, place)).encode())
                table[place] += most * (seed / 2**31 - 1) + self.rounding * (self.since % 7)
        return [output]

    def stats(self):
        return {"prefill_tokens": len(self.asked)}


SCORING = ScoringSection(labels=LABELS, calibrate=True)


def config_of(tmp_path, rows, *, name="out.jsonl", mode="classify", audit=0.3, **job) -> RunConfig:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(
        job_config(source, tmp_path / name, mode=mode, **job),
        scoring=SCORING if mode == "classify" else ScoringSection(),
        cascade=CascadeSection(agreement=AGREEMENT, audit=audit),
        compression=CompressionSection(preset="int8"),
    )


def run(config, compressed=None, dense=None):
    """(output rows, mode) of a job on two fake engines."""
    mode = mode_for(config)
    engine = CascadeEngine(compressed or NoisyScorer(rounding=0), dense or FakeScorer())
    path, _ = run_job(config, engine, mode=mode, tokenizer=Bytes())
    return [json.loads(line) for line in path.read_text().splitlines()], mode


def alone(config, engine, values) -> list[dict]:
    """What one model says of all rows."""
    mode = mode_for(dataclasses.replace(config, cascade=CascadeSection()))
    works = {f"{n}": mode.parse(value) for n, value in enumerate(values)}
    return [plain(row) for row in score_all(mode, works, engine, Bytes())]


VALUES = {
    "classify": lambda n: {"text": f"text {n}"},
    "score": lambda n: {"context": f"context {n}", "choices": [" no", " yes", " perhaps"]},
    "rank": lambda n: {"query": f"query {n}", "candidates": ["one", "two", "many"]},
}
BEST = {
    "classify": lambda row: row["label"],
    "score": lambda row: row["best"],
    "rank": lambda row: row["ranking"][0],
}


@pytest.mark.parametrize("mode", sorted(VALUES))
def test_each_row_is_what_the_named_model_says_alone(tmp_path, mode):
    values = [VALUES[mode](n) for n in range(300)]
    config = config_of(tmp_path, [{"id": n} | v for n, v in enumerate(values)], mode=mode)
    rows, cascade = run(config)
    dense = alone(config, FakeScorer(), values)
    compressed = alone(config, NoisyScorer(rounding=0), values)
    best, whys = BEST[mode], []
    for n, row in enumerate(rows):
        said = row.pop("cascade")
        assert row == {"id": n} | (dense if said["model"] == "dense" else compressed)[n]
        same = best(dense[n]) == best(compressed[n])
        assert said["same"] == (same if said["model"] == "dense" else None)
        assert (said["model"] == "compressed") == (said["why"] == "sure")
        whys.append(said["why"])
        if said["why"] in ("sure", "audit"):
            assert said["margin"] > cascade.promise.threshold
        if said["why"] == "unsure":
            assert said["margin"] <= cascade.promise.threshold
    assert whys[:CALIBRATION] == ["calibration"] * CALIBRATION
    # Rows on their way when it ends are calibration too: those in the engines, two times four.
    assert CALIBRATION <= whys.count("calibration") <= CALIBRATION + 8
    assert min(whys.count(why) for why in ("sure", "unsure", "audit")) > 5
    counts = cascade.account()["rows"]
    assert counts == {why: whys.count(why) for why in counts}
    assert cascade.account()["of_dense_time"] > 0


def test_the_margin_is_that_of_the_two_best(tmp_path):
    config = config_of(tmp_path, [{"id": "a", "text": "one"}])
    (row,), _ = run(config)
    said = alone(config, NoisyScorer(rounding=0), [{"text": "one"}])[0]
    second, best = sorted(said["probabilities"].values())[-2:]
    assert row["cascade"]["margin"] == pytest.approx(np.log(best / second), abs=1e-4)


def test_errors_stay_what_they_are_and_the_dense_model_helps_out(tmp_path):
    rows = [{"id": n, "text": f"text {n}"} for n in range(3)]
    rows[1:1] = [{"id": "long", "text": "x" * 60}, {"id": "none"}, {"id": "?", "text": "so?"}]
    compressed, dense = NoisyScorer(), FakeScorer()
    compressed.broken = {ord("?")}
    found, _ = run(config_of(tmp_path, rows), compressed, dense)
    assert [row["id"] for row in found] == [0, "long", "none", "?", 1, 2]
    assert found[1]["error"]["type"] == "refused" and found[2]["error"]["type"] == "invalid_row"
    assert set(found[1]) == set(found[2]) == {"id", "error"}
    assert found[3]["cascade"] == dict(model="dense", why="calibration", margin=0.0, same=False)
    dense = FakeScorer()
    dense.broken = {ord("?")}
    found, _ = run(config_of(tmp_path, rows, name="other.jsonl"), NoisyScorer(), dense)
    assert found[3]["error"]["type"] == "not_finite" and "cascade" not in found[3]
    dense = FakeScorer()
    dense.max_len = 16
    config = config_of(tmp_path, [{"id": "a", "text": "x" * 30}], name="third.jsonl")
    config = dataclasses.replace(config, scoring=ScoringSection(labels=LABELS))
    found, _ = run(config, NoisyScorer(), dense)
    assert found[0]["error"]["type"] == "refused"


def drifting(count) -> list[dict]:
    """Rows of which the later are harder for the compressed model."""
    return [
        {"id": f"r{n}", "text": f"text {n}" + "!" * (n > 120)} if n % 20 else {"id": f"r{n}"}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("order", "name"), [("input", "out.jsonl"), ("finished", "out.jsonl"), ("input", "out.csv")]
)
def test_killed_cascades_give_the_same_bytes(tmp_path, order, name, monkeypatch):
    monkeypatch.setattr(driver, "_BLOCK", 20)  # of 40 rows
    config = config_of(tmp_path, drifting(360), name=f"whole-{name}", order=order)
    mode = mode_for(config)
    engine = CascadeEngine(NoisyScorer(), NoisyScorer(noise=0))
    whole, _ = run_job(config, engine, mode=mode, tokenizer=Bytes())
    assert len(mode.promise.thresholds) >= 2  # one is found, broken, and another is found
    config = config_of(tmp_path, drifting(360), name=name, order=order)
    kills = 0
    for beats in (140, 155, 260, 171, 400, *[150] * 40):
        engine = CascadeEngine(NoisyScorer(beats=beats), NoisyScorer(noise=0))
        again = mode_for(config)
        try:
            run_job(config, engine, mode=again, tokenizer=Bytes())
        except Killed:
            kills += 1
            continue
        break
    assert kills > 3
    assert (tmp_path / name).read_bytes() == whole.read_bytes()
    counts, wanted = again.account(), mode.account()
    assert {**counts, "of_dense_time": 0} == {**wanted, "of_dense_time": 0}


def test_a_resumed_job_that_is_not_exact_does_not_calibrate_again(tmp_path):
    rows = [{"id": n, "text": f"text {n}"} for n in range(200)]
    config = config_of(tmp_path, rows, exact=False)
    with pytest.raises(Killed):
        run(config, NoisyScorer(beats=300))
    found, mode = run(config)
    assert len(mode.promise.thresholds) == 1
    assert len(found) == 200 and mode.account()["rows"]["sure"] > 50


def test_another_promise_is_another_job(tmp_path):
    rows = [{"id": n, "text": f"text {n}"} for n in range(200)]
    with pytest.raises(Killed):
        run(config_of(tmp_path, rows), NoisyScorer(beats=300))
    with pytest.raises(ValueError, match=r"cascade.audit was 0.3, is 0.2"):
        run(config_of(tmp_path, rows, audit=0.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": JobSection()}, "job.mode='generate' isn't: want score, classify, rank"),
        ({"job": JobSection(mode="embed")}, "job.mode='embed' isn't"),
        ({"engine": EngineSection(speculation="lookup")}, "job.mode='classify' decodes nothing"),
        ({"compression": CompressionSection()}, "give compression.preset, such as w8a8, or casc"),
        ({"pool": PoolSection(ray=2)}, "leave out pool.ray"),
        ({"hosts": HostsSection(coordinator="h:1", count=2)}, "and hosts.coordinator"),
        ({"cascade": CascadeSection(agreement=0.99, calibration=300)}, "Give 368 rows or more"),
    ],
)
def test_settings_that_are_no_cascade_are_refused(tmp_path, changes, message):
    config = dataclasses.replace(config_of(tmp_path, []), **changes)
    with pytest.raises(ValueError, match=message):
        mode_for(config)


def test_drivers_of_one_model_say_so():
    config = RunConfig(cascade=CascadeSection(agreement=0.9))
    with pytest.raises(ValueError, match="bench works with one model: leave out cascade.agreement"):
        config.require_one_engine("bench")


def test_rows_without_choices_are_error_rows(tmp_path):
    found, _ = run(config_of(tmp_path, [{"id": "a", "text": "some text"}], mode="score"))
    assert found[0]["error"]["message"].endswith("about choices, and the row has none: give some")


def test_a_cascade_of_real_engines_from_python(tmp_path):
    folder = model_folder(tmp_path / "model", layers=1)
    texts = [f"number {n} of the words" for n in range(60)]
    config = RunConfig(
        engine=EngineSection(rows=2, max_len=64, prefill_chunk=32, page_size=16),
    )

    def predict(preset, **sections):
        """(probabilities, the promise's account, an answer)."""
        with LeptonEngine() as lepton:
            asked = dataclasses.replace(config, **sections)
            lepton.load_model(folder, config=asked, compression=preset)
            found = lepton.predict(texts, ["one", "two"])
            account = lepton.promise.account() if lepton.promise else {}
            if preset == "none":
                return found, account, ""
            return found, account, lepton.generate("words", SamplingParams(max_tokens=4))[0].text

    promised = CascadeSection(agreement=0.5, audit=0.2)
    (dense, _, _), (compressed, _, text) = predict("none"), predict("int8")
    for replicas in (1, 2):
        mesh = MeshSection(data=replicas)
        found, account, same_text = predict("int8", cascade=promised, mesh=mesh)
        by_dense, by_compressed = (
            np.isclose(found, one, atol=1e-5).all(axis=1) for one in (dense, compressed)
        )
        assert (by_dense | by_compressed).all()
        assert account["rows"]["calibration"] >= 2 * fewest_rows(0.5)
        assert 0 < account["rows"]["sure"] <= by_compressed.sum()
        assert sum(account["rows"].values()) == len(texts)
        assert same_text == text
