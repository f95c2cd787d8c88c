"""Drivers from their command lines, each in a fork of one process: importing takes longer than what
most of them do. What is imported must not start a device, since threads don't survive a fork; it is
frozen, since a fork that ends would look for garbage in all of it, which takes longer than the
rest.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "JAX_PLATFORMS": "cpu",
}
_SERVER = """
import gc, importlib, json, os, runpy, signal, sys
import lepton_jax.cli

for name in {imports!r}:
    importlib.import_module("lepton_jax." + name)
gc.freeze()

for line in sys.stdin:
    folder, said, arguments, variables = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(600)
        for number, name in enumerate((os.devnull, said + "/out", said + "/err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.chdir(folder)
        os.environ.update(variables)
        sys.argv[1:] = arguments
        runpy.run_module("lepton_jax.{driver}", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def forks_of(
    driver: str, *, imports: tuple[str, ...] = (), before: str = ""
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that runs a driver in a folder as `python -m lepton_jax.driver` would, for at most
    ten minutes.

    Args:
      driver: its name.
      imports: modules of the package that drivers would import each for themselves.
      before: code that is run first of all.
    """
    code = before + _SERVER.format(driver=driver, imports=imports)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, **pipes) as server,
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
