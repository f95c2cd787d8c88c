"""What is only worth a try on the best candidate so far: sizes of prefill programs, by the lengths
that its run had; blocks of attention, where texts are so long that it counts; and speculation,
where what was answered or what a draft model costs promises it.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence

import jax

from lepton_jax.config import RunConfig
from lepton_jax.engine.draft_length import Shadow
from lepton_jax.engine.runner import draft_sizes
from lepton_jax.kernels.attention import backend_for
from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.play import prefill_sizes
from lepton_jax.optimizer.predict import Predictor
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.shelf import draft_of
from lepton_jax.optimizer.space import PRESETS, with_fields
from lepton_jax.optimizer.trial import Trial
from lepton_jax.planning.from_config import presets_of
from lepton_jax.telemetry import BeatStats

_PROGRAMS = 4  # sizes of prefill programs besides the largest
_BLOCK_GAIN = 0.1  # of attention, what another block saved at most (BLOCKS of attention_xla.py)
_ACCEPTED = 0.8  # of a draft model's proposals, before anything is known


def refinements(
    config: RunConfig,
    trial: Trial,
    requests: Sequence[SampledRequest],
    *,
    predictor: Predictor,
    given: Collection[str],
) -> Iterator[tuple[dict, float]]:
    """Changes of a config that was tried, each with the share of its seconds that is promised."""
    if "engine.prefill_sizes" not in given and not config.engine.prefill_sizes:
        yield from _sized(config, predictor)
    if "engine.attention_block" not in given and not config.engine.attention_block:
        yield from _blocked(config, predictor)
    if "engine.speculation" not in given and config.engine.speculation == "off":
        costs = predictor.costs(config)
        yield from _looked_up(config, trial, requests, costs=costs)
        yield from _drafted(config, trial, predictor=predictor, given=given)


def _sized(config: RunConfig, predictor: Predictor) -> Iterator[tuple[dict, float]]:
    before = predictor.outlook(config)
    most = config.engine.prefill_chunk
    sizes = prefill_sizes(before.plays, most=most, count=_PROGRAMS)
    fields = {"engine.prefill_sizes": sizes}
    after = predictor.outlook(with_fields(config, fields))
    yield fields, after.seconds / before.seconds


def _blocked(config: RunConfig, predictor: Predictor) -> Iterator[tuple[dict, float]]:
    share = 1 - _BLOCK_GAIN * predictor.attention_share(config)
    page_size = config.engine.page_size  # of which blocks are multiples
    for block in backend_for(jax.default_backend()).BLOCKS[1:]:
        if block % page_size == 0:
            yield {"engine.attention_block": block, "engine.page_size": page_size}, share


def _looked_up(
    config: RunConfig, trial: Trial, requests: Sequence[SampledRequest], *, costs: Costs
) -> Iterator[tuple[dict, float]]:
    tokens = tokens_a_round(requests, trial.outputs, draft_sizes(config.engine.draft_tokens))
    gains = [gain(costs, _rows(trial.beats), draft, tokens[draft]) for draft in tokens]
    yield _fields(costs, "lookup"), _share(trial.beats, max(gains, default=1.0))


def _drafted(
    config: RunConfig, trial: Trial, *, predictor: Predictor, given: Collection[str]
) -> Iterator[tuple[dict, float]]:
    """The model's own best compression as its draft, by what its steps are predicted to cost."""
    if {"engine.draft_model", "engine.draft_preset"} & set(given):
        presets = [config.engine.draft_preset]
    else:
        presets = [preset for preset in PRESETS if preset != config.compression.preset]
    presets = presets_of(config.engine.draft_model or config.model.path, presets)
    costs, rows = predictor.costs(config), _rows(trial.beats)
    shares = {}
    for preset in presets:
        draft = draft_of(with_fields(config, {"engine.draft_preset": preset}))
        with contextlib.suppress(ValueError):  # its weights can't be cut for this mesh
            seconds = predictor.costs(draft).step_seconds(rows)
            shares[preset] = seconds / (costs.step_seconds(rows) or 1.0)
    if not shares:
        return
    best = min(shares, key=shares.get)
    gains = []
    for draft in draft_sizes(config.engine.draft_tokens):
        tokens = 1 + sum(_ACCEPTED**place for place in range(1, 1 + draft))
        gains.append(gain(costs, rows, draft, tokens, share=shares[best]))
    fields = _fields(costs, "draft") | {"engine.draft_preset": best}
    yield fields, _share(trial.beats, max(gains, default=1.0))


def gain(costs: Costs, rows: int, draft: int, tokens: float, *, share: float = 0.0) -> float:
    """How many times as fast a row decodes where a step gives it so many `tokens`, by verifying
    `draft` ones that a model made in steps of `share` of the model's.
    """
    plain = costs.step_seconds(rows)
    seconds = costs.verify_seconds(rows, draft) + (1 + draft) * share * plain
    return tokens * plain / seconds if seconds else 1.0


def tokens_a_round(
    requests: Sequence[SampledRequest], outputs: Sequence[Sequence[int]], drafts: Sequence[int]
) -> dict[int, float]:
    """Tokens that lookup would have given by a step, for each draft length."""
    tokens, rounds = 0, dict.fromkeys(drafts, 0)
    for request, answer in zip(requests, outputs, strict=True):
        shadow = Shadow(request.prompt_ids, drafts)
        tokens += len(answer)
        for token in answer:
            for draft in shadow.add(token):
                rounds[draft] += 1
    return {draft: tokens / max(1, rounds[draft]) for draft in drafts}


def _fields(costs: Costs, kind: str) -> dict:
    """With the measured cost of a token: a job that must be the same each time measures none."""
    return {"engine.speculation": kind, "engine.draft_cost": costs.draft_share}


def _rows(beats: Sequence[BeatStats]) -> int:
    """Of the decode programs, in the mean of their steps."""
    steps = sum(beat.steps for beat in beats)
    return round(sum(beat.steps * beat.row_places for beat in beats) / max(1, steps)) or 1


def _share(beats: Sequence[BeatStats], times: float) -> float:
    """Of the seconds that are left where decoding is so many times as fast."""
    decode = sum(beat.decode_seconds for beat in beats)
    share = decode / (sum(beat.seconds for beat in beats) or 1.0)
    return 1 - share + share / max(1.0, times)
