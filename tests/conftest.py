"""What tests of every room share: the two real models, fetched once into the cache; a CPU that
counts as eight devices, so that sharding is tested in this process (the others take no longer); and
compiled programs, kept for one run of the tests, so that what several tests and processes need is
compiled once. They stay from run to run where JAX_COMPILATION_CACHE_DIR names a directory.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from first_layers import first_layers

from lepton_jax import compile_cache
from lepton_jax.checkpoints.demo import demo_model
from lepton_jax.checkpoints.load import load
from lepton_jax.checkpoints.orbax_store import save

jax.config.update("jax_num_cpu_devices", 8)
# Also of what tests start: jax keeps compiled programs by the number of devices.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

_KEPT = "JAX_COMPILATION_CACHE_DIR"
if _KEPT not in os.environ:  # the test processes and what they start inherit that of the first
    os.environ[_KEPT] = tempfile.mkdtemp(prefix="lepton-jax-tests-")
    atexit.register(shutil.rmtree, os.environ[_KEPT], ignore_errors=True)
compile_cache.enable(os.environ[_KEPT])


def pytest_collection_finish():
    """Modules stay. An engine collects garbage after each program that it compiles, and would look
    at all of theirs again, for a fifth of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """A file's programs go with it. Each takes a few of the mappings that a process may have, which
    are 65,530 on most Linux machines: where none are left, XLA aborts.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    return demo_model("smollm2")


@pytest.fixture(scope="session")
def beginning_path(smollm2_path, tmp_path_factory) -> Path:
    """SmolLM2's first four layers as a saved model: for tests of processes, not of answers."""
    folder = tmp_path_factory.mktemp("beginning") / "model"
    return save(folder, first_layers(load(smollm2_path, dtype="bfloat16"), 4))


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M as a .gguf file."""
    return demo_model("gemma3-270m")
