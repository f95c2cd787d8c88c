"""llama.cpp as a contender, through llama-cpp-python's low-level interface.

All sequences go into one `llama_batch`: prompts of newly admitted ones and a token of each running
one, so a job is continuous batching with `slots` sequences. Other types of the GGUF are made by
`llama_model_quantize` (`prepare`).
"""

import ctypes
import os
import time
from pathlib import Path

import llama_cpp as lib
import numpy as np

MIN_BATCH = 2048


def _file(spec: dict) -> Path:
    return Path(spec["cache"]) / f"{Path(spec['model']).stem}.{spec['type']}.gguf"


def prepare(spec: dict) -> None:
    """Requantizes the model to the asked type, unless that is there already."""
    target = _file(spec)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{spec['type'].upper()}")
    params.allow_requantize = True
    params.nthread = spec["threads"]
    lib.llama_backend_init()
    failed = lib.llama_model_quantize(
        str(spec["model"]).encode(), str(scratch).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama_model_quantize to {spec['type']} returned {failed}")
    scratch.rename(target)


class Contender:
    """A GGUF of one type."""

    def __init__(self, spec: dict):
        self._work = work = spec["workload"]
        self._slots = work["rows"] or spec["slots"]
        longest = spec["longest"] + work["new"]
        self._capacity = max(MIN_BATCH, work["prompt_tokens"] * (work["kind"] != "job"))
        lib.llama_backend_init()
        path = str(_file(spec)).encode()
        self._model = lib.llama_model_load_from_file(path, lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {path.decode()}")
        params = lib.llama_context_default_params()
        params.n_ctx = self._slots * -(-longest // 256) * 256
        params.n_batch = self._capacity
        params.n_seq_max = self._slots
        params.n_threads = params.n_threads_batch = spec["threads"]
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp can't make a context: see stderr")
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(self._capacity, 0, 1)

    def warm_up(self, prompts: list[list[int]]) -> None:
        self.run(prompts)

    def run(self, prompts: list[list[int]]) -> tuple[int, float]:
        """(counted tokens, seconds) of the workload's kind."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        kind, new = self._work["kind"], self._work["new"]
        start = time.perf_counter()
        generated, began = self._serve(prompts, new)
        end = time.perf_counter()
        if generated != len(prompts) * new:
            raise RuntimeError(f"want {len(prompts) * new} tokens, got {generated}")
        if kind == "decode":
            return generated - len(prompts), end - began
        return (generated if kind == "job" else sum(map(len, prompts))), end - start

    def _serve(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        """Serves all prompts. Returns the generated tokens and the moment after the first batch."""
        waiting, free = list(reversed(prompts)), list(range(self._slots))
        running: dict[int, list[int]] = {}  # sequence: [last token, position, tokens generated]
        memory = lib.llama_get_memory(self._context)
        generated, began = 0, 0.0
        while waiting or running:
            self._batch.n_tokens = 0
            came: dict[int, list[int]] = {}  # sequence: prompt
            free.sort(reverse=True)
            room = self._capacity - len(running)
            while waiting and free and len(waiting[-1]) <= room:
                room -= len(waiting[-1])
                came[free.pop()] = waiting.pop()
            order = sorted(running.keys() | came)  # others are computed one by one
            for sequence in order:
                if prompt := came.get(sequence):
                    self._add(prompt, 0, sequence)
                    running[sequence] = [0, len(prompt) - 1, 0]
                else:
                    token, position, _ = running[sequence]
                    self._add([token], position, sequence)
            for sequence, token in zip(order, self._decode(len(order)), strict=True):
                state = running[sequence]
                running[sequence] = [int(token), state[1] + 1, state[2] + 1]
                generated += 1
                if state[2] + 1 == new:
                    del running[sequence]
                    lib.llama_memory_seq_rm(memory, sequence, -1, -1)
                    free.append(sequence)
            began = began or time.perf_counter()
        return generated, began

    def _add(self, tokens: list[int], position: int, sequence: int) -> None:
        """Appends tokens of a sequence; logits are wanted after the last."""
        batch = self._batch
        for offset, token in enumerate(tokens):
            place = batch.n_tokens
            batch.token[place] = token
            batch.pos[place] = position + offset
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = offset == len(tokens) - 1
            batch.n_tokens = place + 1

    def _decode(self, outputs: int) -> np.ndarray:
        """Runs the batch; the likeliest token of each of its `outputs`."""
        failed = lib.llama_decode(self._context, self._batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        logits = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(outputs, self._vocab)).argmax(1)
