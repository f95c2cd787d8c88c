"""Fixtures that tests of every room share: the two real models, fetched once into the cache."""

from pathlib import Path

import pytest

from lepton_jax.checkpoints.demo import demo_model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    return demo_model("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M as a .gguf file."""
    return demo_model("gemma3-270m")
