"""The trace of a job by a clock of our own, the page made of it, and TensorBoard's event files."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from jobs_fakes import ByteTokenizer, FakeEngine, job_config
from tensorboardX.proto.event_pb2 import Event

from lepton_jax.jobs import trace as trace_module
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.report_page import report_page, write_report
from lepton_jax.jobs.summary import ModelCost, summarize
from lepton_jax.jobs.trace import Trace, trace_for
from lepton_jax.telemetry import ScalarLog


class Clock:
    """Goes on by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def trace_of(clock, **options):
    counts = {"prefill_tokens": 0, "decode_tokens": 0}
    return Trace(lambda: counts, clock=clock, **options), counts


def test_stretches_are_differences_of_the_engines_counts(clock):
    trace, counts = trace_of(clock)
    for now, tokens in [(0.4, 10), (1.0, 30), (1.5, 40), (3.0, 90)]:
        clock.now = now
        counts["decode_tokens"] = tokens
        trace.beat()
    assert [(s.begin, s.seconds, s.stats.decode_tokens) for s in trace.stretches] == [
        (0.0, 1.0, 30),
        (1.0, 2.0, 60),
    ]
    assert trace_module.scalars(trace.stretches[1])["generated_tokens_per_second"] == 30


def test_a_long_job_keeps_few_stretches_and_loses_nothing(clock, monkeypatch):
    monkeypatch.setattr(trace_module, "_MOST_STRETCHES", 8)
    trace, counts = trace_of(clock)
    for now in range(1, 101):
        clock.now = now
        counts["decode_tokens"] += 3
        trace.begin(str(now))
        trace.end(str(now), {"prompt_tokens": 1})
        trace.beat(last=now == 100)
    assert len(trace.stretches) < 8
    assert sum(s.stats.decode_tokens for s in trace.stretches) == 300
    assert sum(s.rows for s in trace.stretches) == 100
    ends = [s.begin + s.seconds for s in trace.stretches]
    assert ends[:-1] == [s.begin for s in trace.stretches[1:]] and ends[-1] == 100


def test_latencies_lengths_and_the_slowest_rows(clock):
    trace, _ = trace_of(clock)
    assert trace.latency(0.5) is None
    for i in range(1, 101):
        clock.now = 0.0
        trace.begin(f"r{i}")
        clock.now = i / 10
        trace.end(f"r{i}", {"prompt_tokens": i, "completion_tokens": 1})
    for share in (0.5, 0.9, 0.99):
        assert trace.latency(share) == pytest.approx(10 * share, rel=0.06)
    assert [row[1:] for row in trace.slowest] == [(f"r{i}", i, 1) for i in range(100, 90, -1)]
    assert trace.slowest[0][0] == 10.0
    assert trace.output_lengths == {1: 100}
    assert trace.prompt_lengths.total() == 100
    assert trace.prompt_lengths[4] == 1 and trace.prompt_lengths[8] == 2  # 4; 7 and 8


def test_the_page_needs_nothing_but_itself(tmp_path):
    config = job_config(tmp_path / "in.jsonl", tmp_path / "<out>.jsonl", report=True)
    rows = "".join(f'{{"id": "<r{i}>", "prompt": "{"x" * (i % 7 + 1)}"}}\n' for i in range(40))
    (tmp_path / "in.jsonl").write_text(rows + "{\n")
    engine = FakeEngine()
    with Job(config, GenerateMode(config.sampling)) as job:
        job.resume("model")
        job.workload(ByteTokenizer())
        trace = trace_for(config.job, engine.stats)
        tally = job.run(engine, ByteTokenizer(), trace=trace)
    cost = ModelCost(weight_bytes=1, parameters=1, int8=False)
    told = dict(profile="p", fields={"engine.rows": 8}, objective="latency", effect=2.0, kl=0.0)
    asked = dict(cost=cost, output=job.output.path, optimizer=told)
    summary = summarize(tally, engine.stats(), **asked)
    write_report(report_page(summary, trace), job.output.report)
    page = (tmp_path / "<out>.jsonl.report.html").read_text()
    assert not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)", page)
    assert re.search(r"&lt;r\d+&gt;", page) and not re.search(r"<r\d", page)
    assert "invalid_json" in page and "peaks of" in page
    assert "engine.rows=8 (p)" in page and "2.00 times as fast to a request" in page
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        ElementTree.fromstring(plot)
    assert page.count("<td>100%</td>") == 1


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    write_report("", str(tmp_path / "gone" / "page.html"))
    assert "page.html can't be written: No such file" in caplog.text


def test_tensorboard_gets_the_numbers_of_each_stretch(tmp_path, clock):
    log, knobs = ScalarLog(str(tmp_path / "events")), {}
    trace, counts = trace_of(clock, sink=log, knobs=lambda: knobs)
    counts |= dict(slots=8, pages=40, proposed_tokens=0, accepted_tokens=0)
    for now in (1.0, 2.0):
        trace.begin("a")
        clock.now, counts["decode_tokens"] = now, int(20 * now)
        counts |= dict(running=2 * now, free_pages=30 / now, proposed_tokens=8 * (now - 1))
        counts |= dict(accepted_tokens=2 * (now - 1), prefix_hit_tokens=16 * now)
        knobs["decode_block"] = 4 * now
        trace.end("a", {})
        trace.beat()
    trace.close()
    (file,) = (tmp_path / "events").iterdir()
    found = [
        (value.tag, event.step, value.simple_value)
        for event in events(file.read_bytes())
        for value in event.summary.value
    ]
    assert ("job/generated_tokens_per_second", 1, 20.0) in found
    assert ("job/rows_per_second", 2, 1.0) in found
    assert [item[1:] for item in found if item[0] == "job/running_rows"] == [(1, 0.25), (2, 0.5)]
    assert [item[1:] for item in found if item[0] == "job/free_pages"] == [(1, 0.75), (2, 0.375)]
    assert [item[1:] for item in found if item[0] == "job/acceptance"] == [(2, 0.25)]
    assert [item[1:] for item in found if "/knobs/" in item[0]] == [(1, 4.0), (2, 8.0)]
    assert ("job/prefix_hit_tokens", 2, 16.0) in found
    assert "job/knobs/decode_block" in {tag for tag, _, _ in found}


def events(data):
    """Event files are records of a length of 8 bytes, its check of 4, the data, its check of 4."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_what_no_job_asks_for_costs_nothing(tmp_path, monkeypatch):
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert trace_for(config.job, dict) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="job.tensorboard=.*can't be written: Not a directory"):
        ScalarLog(str(tmp_path / "file" / "events"))
