"""What tests of every room share: the two real models, fetched once into the cache, and a CPU that
counts as eight devices, so that sharding is tested in this process (the others take no longer).
"""

from pathlib import Path

import jax
import pytest

from lepton_jax.checkpoints.demo import demo_model

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    return demo_model("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M as a .gguf file."""
    return demo_model("gemma3-270m")
