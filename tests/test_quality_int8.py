"""How much the int8 presets change a real model's next-token distributions, on public-domain prose.

Measured: the mean Kullback-Leibler divergence KL(float32 || preset), in nats a token, over
4,088 tokens of `fixtures/parity/prose.txt` in windows of 512 that start afresh (10,220 with
PROSE_WINDOWS=20, the same within 6 %). Perplexities are printed with it (`pytest -s`). That the
engine computes what the plain decoder computes is `test_parity_real.py`'s business.

The goals are 2e-3 for int8 weights and 2e-2 for w8a8. With one scale per output (`int8`) the
rounding of SmolLM2's weights alone costs 3.8e-3, and the test only keeps it there; scales for 32
inputs in the sensitive weights (`int8_g32`) meet the goal with 1.7e-3. A key-value cache of 8 bits
may cost 0.3 % of perplexity.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lepton_jax.checkpoints.load import load
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.compression.quality import Reference, compare, reference
from lepton_jax.models.build import Model
from lepton_jax.text import load as load_tokenizer

PROSE = Path(__file__).parent / "fixtures" / "parity" / "prose.txt"
WINDOW = 512
WINDOWS = int(os.environ.get("PROSE_WINDOWS", 8))  # README's table is of 20
MOST = {"int8": 4.5e-3, "int8_g32": 2e-3, "w8a8": 2e-2}  # nats a token, see above


class Float(NamedTuple):
    """The float32 model and its predictions."""

    model: Model
    reference: Reference


@pytest.fixture(scope="module")
def exact(smollm2_path) -> Float:
    loaded = load(smollm2_path, dtype="float32")
    ids = load_tokenizer(loaded.tokenizer_source).encode(PROSE.read_text())
    windows = np.asarray(ids[: WINDOWS * WINDOW], np.int32).reshape(WINDOWS, WINDOW)
    return Float(loaded.model, reference(loaded.model, loaded.leaves, windows))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "most"), MOST.items())
def test_presets_stay_close_to_float32(exact, smollm2_path, preset, most):
    compress = compressor(preset_rules(preset), exact.model.specs)
    leaves = load(smollm2_path, dtype="float32", compress=compress).leaves
    found = compare(exact.reference, exact.model, leaves, seed=0)
    print(
        f"{preset}: KL {found.kl.value:.2e}, perplexity {found.perplexity.value:.3f} "
        f"(float32 {found.dense_perplexity.value:.3f}), {found.places} places"
    )
    assert found.places == WINDOWS * (WINDOW - 1)
    assert 0 < found.kl.value <= most
    assert found.perplexity_ratio.value <= 1 + 2 * most


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "most_kl"), [("int8", 1e-3), ("float8_e4m3fn", 6e-3)])
def test_8_bit_caches_cost_a_third_of_a_percent_at_most(exact, smollm2_path, kv_dtype, most_kl):
    """Perplexity of the float32 model that reads its keys and values from such a cache, as far as
    these windows tell: float8's interval is 0.6 % wide and moves with a CPU's rounding.
    """
    leaves = load(smollm2_path, dtype="float32").leaves
    found = compare(exact.reference, exact.model, leaves, seed=0, kv_dtype=kv_dtype)
    print(f"{kv_dtype} cache: KL {found.kl.value:.2e}, perplexity {found.perplexity_ratio}")
    assert 0 < found.kl.value < most_kl
    assert found.perplexity_ratio.low < 1 + 3e-3
