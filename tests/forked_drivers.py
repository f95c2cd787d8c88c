"""Drivers from their command lines, each in a fork of one process: importing takes longer than what
most of them do. What is imported must not start a device, since threads don't survive a fork.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SERVER = """
import importlib, json, os, sys
from lepton_jax import cli

for name in {imports!r}:
    importlib.import_module(name)
from lepton_jax.{driver} import main

for line in sys.stdin:
    folder, said, arguments, variables = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate((os.devnull, said + "/out", said + "/err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.chdir(folder)
        os.environ.update(variables)
        sys.argv = [{driver!r}, *arguments]
        cli.run_driver(main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def forks_of(
    driver: str, *, imports: tuple[str, ...] = (), before: str = ""
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that runs a driver as `python -m lepton_jax.driver` would, in a folder.

    `before` is run first of all; `imports` are what drivers would import each for themselves.
    """
    code = before + _SERVER.format(driver=driver, imports=imports)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as server,
    ):

        def drive(folder: Path, *arguments: str, **variables: str):
            said = tempfile.mkdtemp(dir=scratch)
            print(json.dumps([str(folder), said, arguments, variables]), file=server.stdin)
            server.stdin.flush()
            code = int(server.stdout.readline())
            out, err = ((Path(said) / name).read_text() for name in ("out", "err"))
            return subprocess.CompletedProcess(arguments, code, out, err)

        yield drive
        server.stdin.close()
