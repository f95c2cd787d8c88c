"""What a receipt asks of the engine: a model's greedy answers, and its speed on this device.

The same is measured of the dense model and of the compressed one, with the same prompts, so that
answers can be compared and speeds divided. Quality in numbers is `compression/quality.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import EngineSection, ReceiptSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.jobs.benchmark import Bench
from lepton_jax.jobs.workloads import Workload
from lepton_jax.models.config import ModelConfig

_PROMPT_TOKENS = 32  # the beginning of a window is a prompt
_ROWS, _DECODE_PROMPT, _DECODE_NEW, _PREFILL = 8, 64, 40, 512  # of the timed runs


@dataclasses.dataclass(frozen=True)
class EngineMeasures:
    """Of one model.

    Attributes:
      answers: token ids of each prompt's greedy answer; none where not asked for.
      decode, prefill: tokens/s of each timed run; none where not asked for.
    """

    answers: list[list[int]]
    decode: list[float]
    prefill: list[float]


def measure(
    loaded: Loaded,
    section: EngineSection,
    *,
    asked: ReceiptSection,
    windows: np.ndarray,
    progress: Callable[[int, int, str], None],
) -> EngineMeasures:
    """Answers the beginnings of token `windows [windows, T]`, then times prefill and decode.

    `progress` is called with (done, total, what comes next).
    """
    progress(0, 3, "greedy answers")
    prompts = windows[: asked.prompts, :_PROMPT_TOKENS].tolist()
    answers = greedy(loaded, section, prompts=prompts, new=asked.new_tokens) if prompts else []
    rates = {}
    for done, work in enumerate(_workloads(loaded.config.max_position), 1):
        progress(done, 3, f"speed of {work.kind}")
        rates[work.kind] = _rates(loaded, section, work=work, repeats=asked.repeats)
    progress(3, 3, "done")
    return EngineMeasures(answers, **rates)


def longest_texts(asked: ReceiptSection) -> dict[str, int]:
    """Tokens that a model's context must hold, by the field to lower."""
    return {
        "receipt.window_tokens": asked.window_tokens,
        f"{_PROMPT_TOKENS} + receipt.new_tokens": _PROMPT_TOKENS + asked.new_tokens,
    }


def require_room(name: str, tokens: int, config: ModelConfig) -> None:
    """Raises ValueError where a model's context is shorter than `tokens`."""
    if tokens > config.max_position:
        raise ValueError(
            f"{name} is {tokens}, but the model's longest context is {config.max_position}: "
            "lower it"
        )


def greedy(
    loaded: Loaded, section: EngineSection, *, prompts: Sequence[Sequence[int]], new: int
) -> list[list[int]]:
    """`new` greedy token ids after each prompt."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    workload = [(len(prompt), params) for prompt in prompts]
    engine = Engine(loaded.model, loaded.leaves, section=section, workload=workload)
    engine.warm_up(workload)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.token_ids
    return answers


def _rates(loaded: Loaded, section: EngineSection, *, work: Workload, repeats: int) -> list[float]:
    if not repeats:
        return []
    bench, vocab = Bench(loaded, section, workload=work), loaded.config.vocab_size
    bench.run(work.prompts(0, vocab))
    return [bench.run(work.prompts(seed, vocab)).rate for seed in range(1, repeats + 1)]


def _workloads(room: int) -> tuple[Workload, Workload]:
    """Of decode and prefill, cut to a model's longest context."""
    new = min(_DECODE_NEW, room // 2)
    prompt = min(_DECODE_PROMPT, room - new)
    prefill = min(_PREFILL, room - 1)
    return (
        Workload("decode", "decode", _ROWS, _ROWS * prompt, new, _ROWS),
        Workload("prefill", "prefill", 1, prefill, 1, 1),
    )
