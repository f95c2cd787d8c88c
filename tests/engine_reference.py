"""What the engine must give: one request after the other, whole forwards, sampling rules in numpy.

No pages, no batches, no state on the device. Only the random draw itself is the engine's sampler
(tested on its own in test_engine_sampling.py), called for one row.
"""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

from lepton_jax.config import SamplingParams
from lepton_jax.engine.row_params import SampleSpec, pack, unpack
from lepton_jax.engine.sampling import sample
from lepton_jax.models.build import Model, abstract_model

LENGTH = 128
DRAW = SampleSpec(stochastic=True, truncate=True)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Outputs of a request; `logprobs` `[n, V]` are the model's own at each of them."""

    token_ids: list[int]
    finish_reason: str
    logprobs: np.ndarray


@functools.cache
def tiny(case: str, layers: int = 0) -> tuple[Model, tuple]:
    """A tiny model in float32 and its leaves, cut to its first layers where asked."""
    fixture = tiny_models.load(case)
    config = fixture.config
    if layers:
        windows, ropes = config.layer_windows[:layers], config.layer_ropes[:layers]
        config = dataclasses.replace(
            config, num_layers=layers, layer_windows=windows, layer_ropes=ropes
        )
    model = abstract_model(config, jnp.float32, jnp.float32)
    return model, tiny_models.in_order(model, fixture.leaves)


@functools.cache
def _forward_of(model: Model):
    return jax.jit(functools.partial(tiny_models.forward, model))


class Reference:
    """Answers requests for a model."""

    def __init__(self, model: Model, leaves: tuple, eos_ids: tuple[int, ...] = ()):
        self._forward = functools.partial(_forward_of(model), leaves)
        self._eos_ids = eos_ids

    def logits(self, ids: list[int]) -> np.ndarray:
        """`[V]` after these ids; what is behind them can't be seen, so one length serves all."""
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(self._forward(padded))[len(ids) - 1]

    def answer(self, prompt: list[int], params: SamplingParams, *, max_len: int) -> Expected:
        own = set(params.stop_token_ids)
        stops = own if params.ignore_eos else own | set(self._eos_ids)
        outputs, logprobs, reason = [], [], "length"
        while len(outputs) < min(params.max_tokens, max_len - len(prompt)):
            logits = self.logits([*prompt, *outputs])
            logprobs.append(logits - np.logaddexp.reduce(logits.astype(np.float64)))
            shaped = shape(logits, prompt, outputs, params=params, stops=stops)
            outputs.append(choose(shaped, params, index=len(outputs)))
            if outputs[-1] in stops:
                reason = "stop"
                break
        return Expected(outputs, reason, np.array(logprobs))


def shape(
    logits: np.ndarray, prompt: list[int], outputs: list[int], *, params: SamplingParams, stops: set
) -> np.ndarray:
    """Bias, penalties, minimum length."""
    logits = logits.copy()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *outputs}:
        r = params.repetition_penalty
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token, count in Counter(outputs).items():
        logits[token] -= params.presence_penalty + count * params.frequency_penalty
    if len(outputs) < params.min_tokens:
        logits[list(stops)] = -np.inf
    return logits


def choose(logits: np.ndarray, params: SamplingParams, *, index: int) -> int:
    if not params.temperature:
        return int(np.argmax(logits))
    plain = SamplingParams(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
    )
    packed = pack([plain], DRAW, eos_ids=(), seeds=[params.seed])
    return int(_draw(logits[None], packed, np.full(1, index, np.int32)))


@jax.jit
def _draw(logits, packed, index):
    drawn = sample(logits, unpack(packed, DRAW), index=index, history=None, spec=DRAW)
    return drawn.tokens[0]
