"""Real Ray on this machine: two actors with SmolLM2 on a core each; one is killed in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import psutil
import pytest
from compress_makers import model_folder

from lepton_jax import run
from lepton_jax.api import LeptonEngine
from lepton_jax.config import (
    CompressionSection,
    EngineSection,
    JobSection,
    ModelSection,
    OptimizerSection,
    PoolSection,
    RunConfig,
    SamplingParams,
)
from lepton_jax.distributed import hosts, ray_replicas
from lepton_jax.distributed.ray_replicas import RayActors
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.mode_for import mode_for
from lepton_jax.kept_programs import source_digest

ROWS = 24


def actor_processes():
    """Those below this process that run our actors."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.cmdline() and p.cmdline()[0].startswith("ray::_Actor")]


def test_a_log_of_decisions_that_nobody_here_takes_is_refused(tmp_path):
    config = RunConfig(
        pool=PoolSection(ray=2), optimizer=OptimizerSection(log=str(tmp_path / "log.jsonl"))
    )
    with LeptonEngine() as lepton, pytest.raises(ValueError, match="optimizer.log is of an engine"):
        lepton.load_model(config=config)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ray": 1, "cpus": 8}, r"pool.cpus=8 each don't fit: Ray's machines have 4, 6 CPU"),
        ({"ray": 4, "cpus": 3}, "pool.ray=4 actors with pool.cpus=3 each don't fit"),
        ({"ray": 2, "gpus": 1}, "have 1, 0 GPU"),
    ],
)
def test_actors_that_no_machine_can_hold_are_refused_and_ray_is_ended(asked, says, monkeypatch):
    ended = []
    machines = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 6.0}]
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **_: None,
        nodes=lambda: [{"Alive": True, "Resources": machine} for machine in machines],
        shutdown=lambda: ended.append(True),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(ValueError, match=says):
        RayActors(PoolSection(**asked), lambda: None)
    assert ended == [True]


class Call:
    """Of an actor's method: Ray's `remote` in this process, at once."""

    def __init__(self, function):
        self.remote = function


def fake_ray(*models, nodes=()):
    """Ray whose actors say these of their models, and are on these of its machines. `loaded`: with
    which cores, and share of the memory, each is to load.
    """
    said, loaded, ended = zip(models, nodes or "0" * len(models), strict=True), [], []

    def actor():
        model, node = next(said)

        def load(_, cores, share):
            loaded.append((cores, share))
            return model

        return SimpleNamespace(node=Call(lambda: node), load=Call(load))

    return SimpleNamespace(
        loaded=loaded,
        is_initialized=lambda: True,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}],
        remote=lambda **_: lambda _: Call(actor),
        get=list,
        kill=ended.append,
        ended=ended,
    )


def test_actors_of_another_model_or_other_code_are_refused(monkeypatch):
    mine = source_digest()
    for models, says in (
        ([("a", 8, mine), ("b", 8, mine)], "different models for the replicas: a, b; copy"),
        ([("a", 8, mine), ("a", 8, "old")], f"is {mine} here and {mine}, old in the replicas"),
    ):
        ray = fake_ray(*models)
        monkeypatch.setitem(sys.modules, "ray", ray)
        with pytest.raises(ValueError, match=says):
            RayActors(PoolSection(ray=2), lambda: None)
        assert len(ray.ended) == 2
    monkeypatch.setitem(sys.modules, "ray", fake_ray(*[("a", 8, mine)] * 2))
    actors = RayActors(PoolSection(ray=2), lambda: None)
    assert (actors.fingerprint, actors.bytes) == ("a", 8)


def test_actors_share_the_cores_and_the_memory_of_their_own_machine(monkeypatch):
    models = [("a", 8, source_digest())] * 4
    for section, shares in (
        (PoolSection(ray=4, cpus=2.0), [(0, 3), (0, 1), (1, 3), (2, 3)]),
        (PoolSection(ray=4, gpus=0.5), [(None, 1)] * 4),  # whose memory is the device's
    ):
        ray = fake_ray(*models, nodes="abaa")
        monkeypatch.setitem(sys.modules, "ray", ray)
        RayActors(section, lambda share: None)
        places = [range(0) if n is None else range(2 * n, 2 * n + 2) for n, _ in shares]
        assert ray.loaded == [(p, 1 / of) for p, (_, of) in zip(places, shares, strict=True)]


def test_a_driver_leaves_accelerators_to_its_actors_before_anything_looks_for_them(monkeypatch):
    told = []
    fake = SimpleNamespace(update=lambda *setting: told.append(setting))
    monkeypatch.setattr(ray_replicas, "jax", SimpleNamespace(config=fake))
    for section in (PoolSection(ray=2), PoolSection(gpus=1.0)):
        ray_replicas.leave_devices(section)
    assert told == []

    def join(config):
        assert told == [("jax_platforms", "cpu")]
        raise ValueError("here it would meet the others")

    monkeypatch.setattr(hosts, "join", join)
    with pytest.raises(SystemExit):
        run.main(RunConfig(pool=PoolSection(ray=2, tpus=4.0)))
    assert len(told) == 1


DESCRIBED = """
import sys
from test_distributed_ray import fake_ray
from lepton_jax.api import LeptonEngine
from lepton_jax.config import ModelSection, PoolSection, RunConfig
from lepton_jax.kept_programs import source_digest

sys.modules["ray"] = fake_ray(("a", 8, source_digest()))
config = RunConfig(model=ModelSection(sys.argv[1]), pool=PoolSection(ray=1, gpus=1.0))
print(LeptonEngine().load_model(config=config).loaded.model.dtype)
"""


def test_a_model_of_actors_with_accelerators_is_described_without_a_device_here(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}  # jax fails where it looks for devices
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    command = [sys.executable, "-c", DESCRIBED, str(model_folder(tmp_path / "model"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_actors_beat_says_what_its_process_took(monkeypatch):
    fake = SimpleNamespace(config=SimpleNamespace(update=lambda *_: None))
    monkeypatch.setattr(ray_replicas, "jax", fake)
    engine = SimpleNamespace(has_work=False, stats=lambda: {"programs": 3})
    actor, starter = ray_replicas._Actor(), SimpleNamespace(engine=engine, fingerprint="a")
    starter.loaded = SimpleNamespace(bytes=8)
    assert actor.load(lambda share: starter, range(0), 1.0) == ("a", 8, source_digest())
    stats = actor.beat([]).stats
    assert stats["programs"] == 3 and stats["device"] == jax.devices()[0].device_kind
    assert stats["peak_memory_bytes"] > 2**20


@pytest.mark.slow
def test_a_killed_actor_costs_no_row(smollm2_path, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": n, "prompt": f"Count on from {n}:"} for n in range(ROWS)]
    for row in rows[::4]:
        row["sampling"] = {"json_schema": {"enum": ["up we go", "down"]}, "ignore_eos": False}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        model=ModelSection(path=str(smollm2_path)),
        pool=PoolSection(ray=2),
        engine=EngineSection(rows=4, max_len=64, prefill_chunk=128),
        compression=CompressionSection(preset="w8a8"),
        sampling=SamplingParams(max_tokens=16, ignore_eos=True),
        job=JobSection(input=str(source), output=str(output)),
    )
    with Job(config, mode_for(config)) as job, LeptonEngine() as lepton:
        lepton.load_model(config=config)
        job.resume(lepton.fingerprint)
        lepton.start(workload=job.workload(lepton.tokenizer))
        processes = actor_processes()
        assert len(processes) == 2
        assert {len(process.cpu_affinity()) for process in processes} == {1}
        assert processes[0].cpu_affinity() != processes[1].cpu_affinity()
        pool, killed = lepton.engine, []
        step = pool.step

        def step_and_kill():
            outputs = step()
            rows_of = [replica["rows"] for replica in pool.stats()["pool"]["replicas"]]
            if not killed and min(rows_of) > 0:  # both have answered some; they step together
                killed.extend(rows_of)
                os.kill(processes[0].pid, signal.SIGKILL)
            return outputs

        pool.step = step_and_kill
        tally = job.run(pool, lepton.tokenizer)
        report = pool.stats()["pool"]
    assert 2 <= sum(killed) < ROWS
    assert (tally.rows, tally.errors) == (ROWS, 0)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(ROWS))
    for row, answer in zip(rows, answers, strict=True):
        if "sampling" in row:
            assert json.loads(answer["text"]) in ("up we go", "down")
        else:
            assert answer["completion_tokens"] == 16
    assert sum(replica["died"] for replica in report["replicas"]) == 1
    assert sum(replica["rows"] for replica in report["replicas"]) == ROWS
    print(json.dumps(report, indent=1))
