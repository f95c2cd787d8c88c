"""How much the int8 presets change a real model's next-token distributions, on public-domain prose.

Measured: the mean Kullback-Leibler divergence KL(float32 || preset), in nats a token, over more
than 10,000 tokens of `fixtures/parity/prose.txt` in windows of 512 that start afresh. Perplexities
are printed with it (`pytest -s`). That the engine computes what the plain decoder computes is
`test_parity_real.py`'s business.

The goals are 2e-3 for int8 and 2e-2 for w8a8. w8a8 meets its own; int8 does not: with one scale per
output channel the rounding of SmolLM2's weights alone costs 3.7e-3 (of it qkv and down 1.9e-3), and
its test only keeps it there. Scales per 64 inputs would give 1.8e-3, and qkv and down left in
bfloat16 1.7e-3 (2026-11-24, three windows).
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax.checkpoints.load import load
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.kernels.attention_reference import causal_attend
from lepton_jax.text import load as load_tokenizer

PROSE = Path(__file__).parent / "fixtures" / "parity" / "prose.txt"
WINDOW = 512
LEAST_TOKENS = 10_000
MOST = {"int8": 4.5e-3, "w8a8": 2e-2}  # nats a token; int8's goal is 2e-3, see above
SLICE = 128  # places whose logits [128, V] are in memory at a time


class Scores(NamedTuple):
    """Means over all places with a next token: KL(float32 || other) and both's -log p, in nats."""

    divergence: float
    loss: float
    float_loss: float


class Float(NamedTuple):
    """The float32 model with its hidden states [windows, T, D] of the prose's `windows` [., T]."""

    model: object
    leaves: tuple
    windows: np.ndarray
    hidden: jax.Array


def hidden_states(model, leaves, windows):
    """[windows, T, D] of token ids [windows, T], each window on its own."""

    @jax.jit
    def run(leaves, ids):
        places = jnp.arange(ids.shape[0])
        caches = (None,) * model.config.num_layers
        return model.bind(leaves)(ids, places, caches, causal_attend)[0]

    return jnp.stack([run(leaves, jnp.asarray(ids)) for ids in windows])


def compare(exact: Float, leaves) -> Scores:
    """The compressed `leaves` of the same model against the float32 ones."""
    model = exact.model

    @jax.jit
    def sums(leaves, hidden, exact_leaves, exact_hidden, following):
        p = jax.nn.log_softmax(model.bind(exact_leaves).logits(exact_hidden))
        q = jax.nn.log_softmax(model.bind(leaves).logits(hidden))
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        losses = (-jnp.take_along_axis(x, following[:, None], 1)[:, 0] for x in (q, p))
        known = following >= 0  # a window's last place has no next token
        return jnp.stack([jnp.sum(jnp.where(known, x, 0)) for x in (divergence, *losses)])

    total = np.zeros(3)
    hidden = hidden_states(model, leaves, exact.windows)
    for ids, ours, theirs in zip(exact.windows, hidden, exact.hidden, strict=True):
        following = np.append(ids[1:], -1)
        for at in range(0, WINDOW, SLICE):
            part = slice(at, at + SLICE)
            total += sums(leaves, ours[part], exact.leaves, theirs[part], following[part])
    return Scores(*(total / (exact.windows.size - len(exact.windows))))


@pytest.fixture(scope="module")
def exact(smollm2_path) -> Float:
    loaded = load(smollm2_path, dtype="float32")
    ids = load_tokenizer(loaded.tokenizer_source).encode(PROSE.read_text())
    count = -(-LEAST_TOKENS // (WINDOW - 1))
    windows = np.asarray(ids[: count * WINDOW], np.int32).reshape(count, WINDOW)
    return Float(
        loaded.model, loaded.leaves, windows, hidden_states(loaded.model, loaded.leaves, windows)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "most"), MOST.items())
def test_presets_stay_close_to_float32(exact, smollm2_path, preset, most):
    compress = compressor(preset_rules(preset), exact.model.specs)
    leaves = load(smollm2_path, dtype="float32", compress=compress).leaves
    scores = compare(exact, leaves)
    perplexity, float_perplexity = np.exp([scores.loss, scores.float_loss])
    print(
        f"{preset}: KL {scores.divergence:.2e}, perplexity {perplexity:.3f} "
        f"(float32 {float_perplexity:.3f}), {exact.windows.size} tokens"
    )
    assert 0 < scores.divergence <= most
    assert perplexity <= float_perplexity * (1 + 2 * most)
