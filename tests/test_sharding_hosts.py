"""One model on the devices of two processes, as on two hosts: both get one device's tokens."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HOST = """
import sys
import jax
import numpy as np
from engine_reference import tiny
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
model, leaves = tiny("gemma3", layers=2)
leaves = [np.asarray(leaf) for leaf in leaves]
section = EngineSection(
    rows=2, page_size=4, num_pages=36, prefill_chunk=32, decode_block=4, max_len=64
)
assert len(jax.devices()) == 4
answers = []
for devices in (jax.devices(), jax.local_devices()[:1]):
    engine = Engine(model, leaves, section=section, devices=devices)
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=7, frequency_penalty=0.5)
    engine.add_request("row", [5, 6, 7, 8, 9], params)
    tokens = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    answers.append(tokens)
print("answers", *answers)
"""


def test_two_processes_share_a_model():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [host.communicate(timeout=300)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    lines = [line for text in said for line in text.splitlines() if line.startswith("answers")]
    assert len(lines) == 2 and len(set(lines)) == 1, said
    together, alone = lines[0].removeprefix("answers [").removesuffix("]").split("] [")
    assert together == alone and len(together.split(",")) == 16
