"""The built-in sizes: they read as configs, have the published number of parameters, and agree with
the config.json of the same models in published_configs.py.
"""

import jax.numpy as jnp
import published_configs
import pytest

from lepton_jax.models.build import abstract_model
from lepton_jax.models.published import PUBLISHED, hf_values
from lepton_jax.models.registry import FAMILIES, config_from_hf

# Billions of parameters, from the models' cards and papers (Gemma 3: text part, without the tower).
BILLIONS = {
    "llama-2-13b": 13.02,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71,
    "tinyllama-1.1b": 1.10,
    "mistral-7b": 7.25,
    "mistral-nemo-12b": 12.25,
    "mistral-small-24b": 23.57,
    "mixtral-8x7b": 46.70,
    "mixtral-8x22b": 140.63,
    "qwen2.5-7b": 7.62,
    "qwen2.5-72b": 72.71,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
    "gemma-2-9b": 9.24,
    "gemma-2-27b": 27.23,
    "gemma-3-270m": 0.268,
    "gemma-3-12b": 11.77,
    "gemma-3-27b": 27.01,
    "phi-3-medium": 13.96,
    "phi-4": 14.66,
    "phi-4-mini": 3.84,
    "smollm3-3b": 3.08,
}
SAME = {
    "llama-3.1-8b": "llama-3.1-8b-instruct",
    "smollm2-135m": "smollm2-135m-instruct",
    "mistral-7b": "mistral-7b-v0.3",
    "phi-3-mini": "phi-3-mini-4k",
} | {name: name for name in PUBLISHED if name in published_configs.PUBLISHED}


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_parameters_are_as_many_as_the_card_says(name):
    model = abstract_model(config_from_hf(hf_values(name)), jnp.bfloat16, jnp.bfloat16)
    found = sum(spec.size for spec in model.specs.values()) / 1e9
    assert found == pytest.approx(BILLIONS[name], rel=0.005)


@pytest.mark.parametrize("name", sorted(SAME))
def test_sizes_agree_with_the_published_file(name):
    ours = config_from_hf(hf_values(name))
    assert ours == config_from_hf(published_configs.PUBLISHED[SAME[name]])


def test_every_entry_reads_and_every_family_has_one():
    assert {config_from_hf(values).family for values in PUBLISHED.values()} == set(FAMILIES)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"published:llama-3\.1-9b is not.*near are llama-3\.1-8b"):
        hf_values("llama-3.1-9b")
