"""Several hosts: they meet, must be alike, agree on plans, and end when one of them ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from compress_makers import config_file, model_folder
from jobs_fakes import job_config

from lepton_jax import run
from lepton_jax.api import LeptonEngine
from lepton_jax.checkpoints.load import load
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.config import (
    EngineSection,
    HostsSection,
    JobSection,
    MeshSection,
    ModelSection,
    PoolSection,
    RunConfig,
    SamplingParams,
)
from lepton_jax.distributed import hosts
from lepton_jax.distributed.hosts import (
    ALONE,
    Hosts,
    _compare,
    _start_jax,
    differences,
    hello,
    join,
    plan_digest,
)
from lepton_jax.distributed.links import _KEEP_ALIVE, GONE, Link, accept, connect
from lepton_jax.engine.request import Chunk, Entry, Plan, Request, Row
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.generate import GenerateMode

ROOT = Path(__file__).parents[1]


def free_ports():
    """A port whose next one is free too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        try:
            socket.create_server(("127.0.0.1", port + 1)).close()
        except OSError:
            continue
        return port


def ends():
    """Of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def linked():
    """Hosts 0 and 1 of this process."""
    near, far = ends()
    return Hosts(0, 2, {1: Link(near)}), Hosts(1, 2, {0: Link(far)})


def plan(*, slot=0, steps=4, params=None, seed=0):
    row = Row(Request("a", (1, 2, 3), params, seed=seed), 5)
    return Plan((Chunk(row, slot, (1,), 0, (1, 2, 3), True),), (Entry(row, slot, (1,), 3),), steps)


def test_one_host_is_alone():
    assert join(RunConfig()) is ALONE
    assert ALONE.first and ALONE.share(7) == 7
    ALONE.agree(plan())


def test_host_0_has_the_say():
    first, second = linked()
    with first, second:
        first.share({"rows": 3})
        assert second.share(None) == {"rows": 3}
        for same in (plan(), None, plan(steps=2)):
            first.agree(same)
            second.agree(same)
        first.agree(plan(slot=1))
        with pytest.raises(RuntimeError, match="plan 3 of host 1 isn't that of host 0"):
            second.agree(plan())


def test_another_input_is_named_before_anything_is_written(tmp_path):
    first, second = linked()
    with first, second:
        for folder in ("mine", "theirs"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "in.jsonl").write_text(f'{{"prompt": "{folder}"}}\n')
        first.share([["in.jsonl", "another digest"]])
        config = job_config(tmp_path / "mine" / "in.jsonl", tmp_path / "out.jsonl")
        with (
            Job(config, GenerateMode(config.sampling), hosts=second) as job,
            pytest.raises(JobError, match="in.jsonl' holds other files on host 1 than on host"),
        ):
            job.resume("model")


def test_files_of_another_model_are_named_before_they_are_loaded(tmp_path):
    one, same, other = (
        str(model_folder(tmp_path / f"{n}", seed=seed)) for n, seed in enumerate((0, 0, 1))
    )
    first, second = linked()
    with first, second:
        first.require_same_models(RunConfig(model=ModelSection(one)))
        second.require_same_models(RunConfig(model=ModelSection(same)))
        first.require_same_models(RunConfig(model=ModelSection(one)))
        with pytest.raises(ValueError, match="model.path=.* holds another model on host 1 than on"):
            second.require_same_models(RunConfig(model=ModelSection(other)))
        drafts = [EngineSection(draft_model=path) for path in (one, other)]
        first.require_same_models(RunConfig(model=ModelSection(one), engine=drafts[0]))
        with pytest.raises(ValueError, match="engine.draft_model=.* holds another model"):
            second.require_same_models(RunConfig(model=ModelSection(same), engine=drafts[1]))
    ALONE.require_same_models(RunConfig(model=ModelSection("gone")))


def test_a_run_compares_models_before_it_loads_one(monkeypatch, capsys):
    class Told(Hosts):
        def require_same_models(self, config):
            raise ValueError("another model")

        def __exit__(self, *_):
            """This process goes on."""

    monkeypatch.setattr(hosts, "join", lambda config: Told(0, 2))
    with pytest.raises(SystemExit):
        run.main(RunConfig())
    assert "error: another model" in capsys.readouterr().err


def test_a_plan_is_what_the_device_is_told():
    assert plan_digest(plan()) == plan_digest(plan())
    hot = plan(params=SamplingParams(temperature=1.0))
    plans = (None, plan(), plan(slot=1), plan(steps=5), hot, plan(seed=1))
    assert len({plan_digest(p) for p in plans}) == 6


def test_a_host_that_is_cut_off_is_missed_whether_or_not_data_is_on_its_way():
    near, far = ends()
    with near, far:
        Link(near)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        found = {n: near.getsockopt(socket.IPPROTO_TCP, getattr(socket, n)) for n in _KEEP_ALIVE}
    silent = found["TCP_KEEPIDLE"] + found["TCP_KEEPINTVL"] * found["TCP_KEEPCNT"]
    assert silent < 30 and found["TCP_USER_TIMEOUT"] / 1000 < 30


def test_hosts_that_do_not_come_are_named():
    port = free_ports()
    with pytest.raises(ValueError, match=r"hosts \[1, 2\] of hosts.count=3 haven't come within"):
        accept(("127.0.0.1", port), 3, 0.2)
    with pytest.raises(ValueError, match=f"hosts.coordinator=127.0.0.1:{port} can't be reached"):
        connect(("127.0.0.1", port + 1), 1, 0.2)


def test_an_index_is_one_hosts_and_both_are_told():
    port, said = free_ports(), []

    def come():
        links = {0: connect(("127.0.0.1", port), 1, 5.0)}
        with pytest.raises(ValueError) as error:
            _compare(links, 1, {})
        said.append(str(error.value))

    twice = [threading.Thread(target=come) for _ in "ab"]
    for thread in twice:
        thread.start()
    with pytest.raises(ValueError, match="two hosts have hosts.index=1"):
        accept(("127.0.0.1", port), 3, 5.0)
    for thread in twice:
        thread.join(timeout=5.0)
    assert said == ["two hosts have hosts.index=1: give each its own"] * 2


def test_a_host_that_ends_before_all_have_met_is_named():
    near, far = ends()
    far.close()
    with pytest.raises(ValueError, match="host 1 has ended before all had met"):
        _compare({1: Link(near)}, 0, {})
    near, far = ends()
    far.close()
    with pytest.raises(ValueError, match="host 0 has ended before all had met"):
        _compare({0: Link(near)}, 1, {})


def test_strangers_at_the_door_are_no_hosts():
    port, greetings = free_ports(), [b"", b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"index": 0}\n']
    links = {}
    door = threading.Thread(target=lambda: links.update(accept(("127.0.0.1", port), 2, 20.0)))
    door.start()
    while greetings:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5.0) as stranger:
                stranger.sendall(greetings[-1])
            greetings.pop()
        except ConnectionRefusedError:
            time.sleep(0.05)  # the door isn't open yet
    host = connect(("127.0.0.1", port), 1, 20.0)
    door.join()
    host.send({"hello": "there"})
    assert links[1].read() == {"hello": "there"}
    with pytest.raises(ValueError, match="hosts.index=3, and hosts.count=2 here"):
        threading.Thread(target=connect, args=(("127.0.0.1", port + 1), 3, 5.0)).start()
        accept(("127.0.0.1", port + 1), 2, 5.0)


def test_a_taken_port_is_named():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(ValueError, match="hosts.coordinator: port .* can't be opened"),
    ):
        accept(("127.0.0.1", server.getsockname()[1]), 2, 1.0)


def test_what_differs_between_hosts_is_named():
    mine = hello(RunConfig(hosts=HostsSection("h:1", count=2, index=0)))
    same = hello(RunConfig(hosts=HostsSection("h:1", count=2, index=1)))
    other = hello(RunConfig(hosts=HostsSection("h:1", count=2), mesh=MeshSection(model=2)))
    assert differences(mine, same) == []
    assert differences(mine, other) == ["config.mesh.model is 1 and 2"]
    assert differences(mine, same | {"jax": "0.0"}) == [f"jax is {mine['jax']} and 0.0"]


def test_what_several_hosts_cannot_do_is_refused():
    hosts = HostsSection("h:1", count=2)
    with pytest.raises(ValueError, match="mesh.data or pool.ray makes replicas"):
        join(RunConfig(hosts=hosts, mesh=MeshSection(data=2)))
    with pytest.raises(ValueError, match="mesh.data or pool.ray makes replicas"):
        join(RunConfig(hosts=hosts, pool=PoolSection(ray=1)))
    with pytest.raises(ValueError, match="hosts.count=2 without hosts.coordinator: each host"):
        join(RunConfig(hosts=HostsSection(count=2)))
    with pytest.raises(ValueError, match="job.exact=true"):
        join(RunConfig(hosts=hosts, job=JobSection(exact=False)))
    with pytest.raises(ValueError, match="coordinator='nowhere' is not allowed: want HOST:PORT"):
        HostsSection("nowhere")


def test_settings_of_several_hosts_are_refused_by_an_engine_that_has_not_met_them():
    for section, field in (
        (HostsSection("h:1", count=2, index=1), "coordinator='h:1'"),
        (HostsSection(count=2), "count=2"),
        (HostsSection(timeout=5.0), "timeout=5.0"),
    ):
        config = RunConfig(hosts=section)
        with pytest.raises(ValueError, match=rf"^hosts\.{field}: .*LeptonEngine\(sync=hosts\)"):
            LeptonEngine().load_model("nowhere", config=config)
        with pytest.raises(ValueError, match="'nowhere' doesn't exist"):
            LeptonEngine(sync=ALONE).load_model("nowhere", config=config)


def test_auto_where_jax_knows_no_cluster_says_what_to_give(monkeypatch):
    def none(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", none)
    with pytest.raises(ValueError, match=r"hosts\.coordinator=auto: jax can't .* give HOST:PORT"):
        _start_jax(HostsSection("auto"))


class Runs:
    """The driver as hosts of this machine, four devices each, on a tiny model that we saved; as one
    device on the files that it was made of.
    """

    def __init__(self, folder):
        self.folder = folder
        (folder / "model").mkdir()
        model_folder(folder / "model")
        (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
        save(folder / "saved", load(folder / "model"))
        rows = [{"id": n, "prompt": f"row {n}"} for n in range(14)]  # a step is many collectives
        for row in rows[1::3]:
            row["sampling"] = {"regex": "[a-d]{6,18}", "temperature": 1.0, "ignore_eos": False}
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        engine = {"rows": 2, "page_size": 16, "max_len": 80, "prefill_chunk": 32}
        self.config = config_file(
            folder / "config.py",
            model={"path": str(folder / "model")},
            engine=engine,
            sampling={"max_tokens": 24, "ignore_eos": True},
            job={"input": str(folder / "in.jsonl")},
        )

    def start(self, output, devices, *flags):
        command = [sys.executable, "-m", "lepton_jax.run", f"--config={self.config}", *flags]
        command.append(f"--config.job.output={self.folder / output}")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # they compile more than they run
        }
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def hosts(self, output, *, indices=(0, 1), flags=()):
        address = f"--config.hosts.coordinator=127.0.0.1:{free_ports()}"
        model = f"--config.model.path={self.folder / 'saved'}"
        shared = (address, model, "--config.hosts.count=2", "--config.mesh.model=8", *flags)
        return [self.start(output, 4, *shared, f"--config.hosts.index={n}") for n in indices]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("hosts"))


@pytest.mark.slow
def test_two_hosts_give_the_bytes_of_one_and_a_killed_one_ends_the_other(runs):
    one = runs.start("one.jsonl", 1)
    assert one.wait(timeout=300) == 0, one.stderr.read()
    pair = runs.hosts("two.jsonl")
    partial = runs.folder / "two.jsonl.partial"
    until = time.monotonic() + 200
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < until and pair[0].poll() is None
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, said = pair[0].communicate(timeout=30)
    assert time.monotonic() - killed < 30
    assert pair[0].returncode == GONE
    assert "error: host 1 of 2 is gone (killed, or cut off); repeat the command" in said
    pair[1].communicate()
    assert not (runs.folder / "two.jsonl").exists()
    again = runs.hosts("two.jsonl")
    said = [host.communicate(timeout=300)[1] for host in again]
    assert [host.returncode for host in again] == [0, 0], said
    assert "rows of an interrupted run" in said[0]
    ours, theirs = (
        [json.loads(line) for line in (runs.folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert ours == theirs
    assert all(re.fullmatch("[a-d]{6,18}", row["text"]) for row in ours[1::3])


@pytest.mark.slow
def test_hosts_that_differ_say_so_and_a_dead_host_0_is_named(runs):
    flags = (f"--config.hosts.coordinator=127.0.0.1:{free_ports()}", "--config.hosts.count=2")
    pair = [
        runs.start(
            "x.jsonl", 4, *flags, f"--config.hosts.index={n}", f"--config.engine.rows={n + 1}"
        )
        for n in (0, 1)
    ]
    for host in pair:
        _, said = host.communicate(timeout=120)
        assert host.returncode == 2
        assert "the hosts differ: hosts 0 and 1: config.engine.rows is 1 and 2" in said
        assert "Traceback" not in said
    (lonely,) = runs.hosts("x.jsonl", indices=[1], flags=("--config.hosts.timeout=1",))
    _, said = lonely.communicate(timeout=60)
    assert lonely.returncode == 2
    assert "can't be reached within hosts.timeout=1 s" in said


def test_launchers_say_what_they_do():
    local = [sys.executable, str(ROOT / "scripts" / "launch_local.py"), "--help"]
    pod = [str(ROOT / "scripts" / "launch_tpu_pod.sh"), "--help"]
    for command, word in ((local, "--devices"), (pod, "hosts.coordinator=auto")):
        assert word in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    dry = [pod[0], "name", "zone", "~/here", "--", "--config=c.py", "--config.job.output=a b"]
    environment = os.environ | {"DRY_RUN": "1"}
    said = subprocess.run(dry, capture_output=True, text=True, check=True, env=environment).stdout
    assert "--worker=all" in said and "--zone=zone" in said and "hosts.coordinator=auto" in said
    assert subprocess.run(pod[:1], capture_output=True).returncode == 2


SAYS = """
import json, os, pathlib, sys
index = sys.argv[-1].removeprefix("--config.hosts.index=")
said = json.dumps([os.environ["JAX_NUM_CPU_DEVICES"], *sys.argv[1:-1]])
pathlib.Path(f"said-{index}").write_text(said)
sys.exit(3 * int(index))
"""


def test_the_local_launcher_starts_all_hosts_alike_and_ends_with_the_worst(tmp_path):
    (tmp_path / "says.py").write_text(SAYS)
    launcher = [sys.executable, str(ROOT / "scripts" / "launch_local.py"), "--driver=says"]
    done = subprocess.run(
        [*launcher, "--hosts=2", "--devices=4", "--", "--config=c.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    said, same = (json.loads((tmp_path / f"said-{n}").read_text()) for n in (0, 1))
    devices, flag, coordinator, count = said
    assert said == same and (devices, flag, count) == (
        "4",
        "--config=c.py",
        "--config.hosts.count=2",
    )
    assert re.fullmatch(r"--config\.hosts\.coordinator=127\.0\.0\.1:\d+", coordinator)


WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as the drivers do
from lepton_jax.config import HostsSection, MeshSection, RunConfig
from lepton_jax.distributed.hosts import join
section = HostsSection(f"127.0.0.1:{sys.argv[1]}", count=2, index=int(sys.argv[2]), timeout=60)
with join(RunConfig(hosts=section, mesh=MeshSection(model=2))):
    print("joined", flush=True)
    time.sleep(60)
"""


def waiting_pair():
    """Two hosts that have met."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["JAX_NUM_CPU_DEVICES"] = "1"
    port = str(free_ports())
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, port, index],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in "01"
    ]
    assert [host.stdout.readline() for host in pair] == ["joined\n"] * 2
    return pair


@pytest.mark.parametrize(
    ("which", "sent", "code"),
    [(0, signal.SIGINT, 130), (1, signal.SIGINT, 130), (1, signal.SIGTERM, 143)],
)
def test_an_interrupted_host_ends_all_as_one_host_would_end(which, sent, code):
    pair = waiting_pair()
    pair[which].send_signal(sent)
    said = [host.communicate(timeout=30)[1] for host in pair]
    assert [host.returncode for host in pair] == [code, code], said
    assert "Traceback" not in said[which]
    assert said[which].endswith("interrupted\n") == (sent == signal.SIGINT)
    assert f"error: host {which} of 2 was interrupted; repeat the command" in said[1 - which]


@pytest.mark.parametrize("dies", [0, 1])
def test_whoever_dies_the_other_names_it(dies):
    pair = waiting_pair()
    pair[dies].send_signal(signal.SIGKILL)
    _, said = pair[1 - dies].communicate(timeout=30)
    gone = f"error: host {dies} of 2 is gone"
    if dies == 0 and jax.__version_info__ < (0, 10):  # jax of then ends its hosts itself, at once
        gone = f"{gone}|JAX distributed service detected fatal errors"
    assert re.search(gone, said)
    assert pair[1 - dies].returncode != 0
    pair[dies].communicate()
