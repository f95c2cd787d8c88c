"""What a receipt asks of the engine: a model's greedy answers, and its speed on this device.

The same is measured of the dense model and of the compressed one, with the same prompts, so that
answers can be compared and speeds divided. Quality in numbers is `compression/quality.py`.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import psutil

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import EngineSection, ReceiptSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.sizing import device_room
from lepton_jax.jobs.benchmark import Bench
from lepton_jax.jobs.workloads import Workload

Side = tuple[Loaded, EngineSection]  # a model and the engine that serves it

_PROMPT_TOKENS = 32  # the beginning of a window is a prompt
_ROWS, _DECODE_PROMPT, _DECODE_NEW, _PREFILL = 8, 64, 40, 512  # of the timed runs
# Models of the dense one's size: it, the compressed one, what that was before its recovery, and
# what caches and compiling take.
_ROOM = 4


def greedy_answers(
    side: Side,
    *,
    asked: ReceiptSection,
    windows: np.ndarray,
    progress: Callable[[int, int, str], None],
) -> list[list[int]]:
    """Greedy token ids after the beginnings of token `windows [windows, T]`; none where
    `receipt.prompts` is 0. `progress` is called with (done, total, what comes next).
    """
    prompts = windows[: asked.prompts, :_PROMPT_TOKENS].tolist()
    progress(0, 1, "greedy answers")
    found = _served(side, prompts, new=asked.new_tokens) if prompts else []
    progress(1, 1, "done")
    return found


def rates(
    sides: Sequence[Side], *, repeats: int, progress: Callable[[int, int, str], None]
) -> list[dict[str, float]]:
    """Tokens/s of decode and prefill, by phase, in the best of so many runs of each side.

    Sides take turns, so that what else the machine does slows all alike. `progress` is called with
    (done, total, what comes next).
    """
    works = _workloads(sides[0][0].config.max_position)
    found: list[dict[str, float]] = [{} for _ in sides]
    for done, work in enumerate(works):
        progress(done, len(works), f"speed of {work.kind}")
        for rows, runs in zip(found, _in_turns(sides, work, repeats), strict=True):
            rows[work.kind] = max(runs)
    progress(len(works), len(works), "done")
    return found


def fit_together(dense: int) -> bool:
    """Whether the memory that is free before any is loaded holds a dense model of so many bytes
    beside the compressed one, so that they can take turns.
    """
    room = device_room(jax.local_devices()[0])
    return _ROOM * dense <= (psutil.virtual_memory().available if room is None else room)


def longest_texts(asked: ReceiptSection) -> dict[str, int]:
    """Tokens that a model's context must hold, by the field to lower."""
    return {
        "receipt.window_tokens": asked.window_tokens,
        f"{_PROMPT_TOKENS} + receipt.new_tokens": _PROMPT_TOKENS + asked.new_tokens,
    }


def _served(side: Side, prompts: Sequence[Sequence[int]], *, new: int) -> list[list[int]]:
    """`new` greedy token ids after each prompt."""
    loaded, section = side
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


def _in_turns(sides: Sequence[Side], work: Workload, repeats: int) -> list[list[float]]:
    """Tokens/s of each side's runs, after one that isn't counted."""
    vocab = sides[0][0].config.vocab_size
    benches = [Bench(loaded, section, workload=work) for loaded, section in sides]
    runs: list[list[float]] = [[] for _ in benches]
    for seed in range(1 + repeats):
        prompts = work.prompts(seed, vocab)
        for bench, own in zip(benches, runs, strict=True):
            own.append(bench.run(prompts).rate)
    return [own[1:] for own in runs]


def _workloads(room: int) -> tuple[Workload, Workload]:
    """Of decode and prefill, cut to a model's longest context."""
    new = min(_DECODE_NEW, room // 2)
    prompt = min(_DECODE_PROMPT, room - new)
    prefill = min(_PREFILL, room - 1)
    return (
        Workload("decode", "decode", _ROWS, _ROWS * prompt, new, _ROWS),
        Workload("prefill", "prefill", 1, prefill, 1, 1),
    )
