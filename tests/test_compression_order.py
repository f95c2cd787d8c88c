"""The literature's order of methods on a real model: SmolLM2's first layers, KL over prose.

Four layers are compressed, the others stay as they are: enough for the order, and fast. Figures for
whole models are in README. Texts: calibration on the one that ships, prose of other books measured,
the same 768 places for all methods.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from first_layers import model_of_first

from lepton_jax.checkpoints.load import load
from lepton_jax.compression.calibrate import Options, compress_layers
from lepton_jax.compression.calibration_data import CALIBRATION_TEXT, draw_windows
from lepton_jax.compression.layer_programs import LayerPrograms, embedded
from lepton_jax.compression.recipe import parse_rule
from lepton_jax.models.decoder import rms_norm
from lepton_jax.tensors import einsum
from lepton_jax.text import load as load_tokenizer

PROSE = Path(__file__).parent / "fixtures" / "parity" / "prose.txt"
LAYERS = 4
RULE = r"layers\.\d+\.(qkv|out|gate_up|down)"
WINDOWS, WINDOW = 3, 256


class Exact(NamedTuple):
    """The float32 model, that of its first layers, its leaves by path, both texts' tokens
    `[windows, T]`, its log-probabilities `[windows, T, V]` of the prose, and the programs of its
    layers.
    """

    model: object
    beginning: object
    leaves: dict
    prose: np.ndarray
    calibration: np.ndarray
    logprobs: list[jax.Array]
    programs: LayerPrograms


def hidden_states(model, programs, leaves, tokens):
    x = embedded(model, leaves["embed"], jnp.asarray(tokens))
    for index in range(model.config.num_layers):
        prefix = f"layers.{index}."
        layer = {p[len(prefix) :]: leaf for p, leaf in leaves.items() if p.startswith(prefix)}
        x = programs.of(index, None).outputs(layer, x)
    return rms_norm(x, leaves["final_norm"], model.config.norm_eps)


@pytest.fixture(scope="module")
def exact(smollm2_path) -> Exact:
    loaded = load(smollm2_path, dtype="float32")
    tokenizer = load_tokenizer(loaded.tokenizer_source)
    ids = tokenizer.encode(PROSE.read_text())[: WINDOWS * WINDOW]
    prose = np.asarray(ids, np.int32).reshape(WINDOWS, WINDOW)
    drawn = draw_windows(CALIBRATION_TEXT, tokenizer, windows=8, length=WINDOW, seed=0)
    leaves = dict(zip(loaded.model.specs, loaded.leaves, strict=True))
    programs = LayerPrograms(loaded.model)
    hidden = hidden_states(loaded.model, programs, leaves, prose)
    logprobs = [logprobs_of(leaves["embed"], window) for window in hidden]
    beginning = model_of_first(loaded.model, LAYERS)
    return Exact(loaded.model, beginning, leaves, prose, drawn.tokens, logprobs, programs)


@jax.jit
def logprobs_of(table, hidden):
    """`[T, V]` of hidden states `[T, D]`."""
    return jax.nn.log_softmax(einsum("TD,VD->TV", hidden, table))


@jax.jit
def mean_divergence(table, exact, hidden):
    """KL over places: log-probabilities `[T, V]` against hidden states `[T, D]`."""
    return jnp.mean(jnp.sum(jnp.exp(exact) * (exact - logprobs_of(table, hidden)), axis=-1))


def divergence(exact, scheme, **options):
    """Mean KL(float32 || compressed), nats a token."""
    rules, options = [parse_rule(f"{RULE} -> {scheme}")], Options(**options)
    first = {path: exact.leaves[path] for path in exact.beginning.specs}
    compressed, _ = compress_layers(
        exact.beginning, first, exact.calibration, rules, options=options
    )
    hidden = hidden_states(exact.model, exact.programs, exact.leaves | compressed, exact.prose)
    table = exact.leaves["embed"]
    pairs = zip(exact.logprobs, hidden, strict=True)
    found = np.mean([float(mean_divergence(table, *pair)) for pair in pairs])
    print(f"{scheme} {options}: KL {found:.3e}")
    return found


@pytest.mark.slow
def test_gptq_and_awq_beat_rounding_at_int4(exact):
    rtn = divergence(exact, "weights=int4 group=128")
    assert divergence(exact, "weights=int4 group=128 rounding=gptq") < 0.8 * rtn
    assert divergence(exact, "weights=int4 group=128", smooth="awq") < 0.8 * rtn


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_and_wanda_beat_magnitude_at_half(exact, pattern):
    found = {
        method: divergence(exact, f"weights=keep prune={method} sparsity=0.5 pattern={pattern}")
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    assert found["sparsegpt"] <= found["wanda"] < 0.7 * found["magnitude"]


@pytest.mark.slow
def test_smoothquant_beats_plain_static_ranges(exact):
    scheme = "weights=int8 activations=static"
    assert divergence(exact, scheme, smooth="smoothquant") < 0.8 * divergence(exact, scheme)
