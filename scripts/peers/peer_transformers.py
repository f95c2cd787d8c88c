"""transformers as a contender: a greedy loop over `model(...)` with its own key-value cache.

The loop is leaner than `generate`. Equal prompts run with and without a padding mask, because
either can be the faster attention path; a job is sorted by length, padded on the left and tried in
several batch sizes. The warm-up picks the fastest setting. Weights are dequantized from the GGUF
once (`prepare`) and saved in the cache.
"""

import os
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TRIAL_TOKENS = 16


def _folder(spec: dict) -> Path:
    return Path(spec["cache"]) / f"{Path(spec['model']).stem}.{spec['type']}.hf"


def prepare(spec: dict) -> None:
    """Writes the model as safetensors in the asked dtype, unless it is there already."""
    folder, source = _folder(spec), Path(spec["model"])
    if folder.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=getattr(torch, spec["type"])
    )
    # The weights are plain by now, but a model that knows its GGUF past refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(scratch)
    scratch.rename(folder)


class Contender:
    """A model in one dtype."""

    def __init__(self, spec: dict):
        torch.set_num_threads(spec["threads"])
        self._work = spec["workload"]
        self._batches = spec["batches"]
        self._model = AutoModelForCausalLM.from_pretrained(
            _folder(spec), dtype=getattr(torch, spec["type"])
        ).eval()
        self._masked, self._batch = False, self._batches[0]

    @torch.inference_mode()
    def warm_up(self, prompts: list[list[int]]) -> None:
        """Runs each setting and keeps the fastest."""
        if self._work["kind"] == "job":
            trial = prompts[: max(self._batches)]
            seconds = {size: self._job(trial, size)[1] for size in self._batches}
            self._batch = min(seconds, key=seconds.get)
            return
        new = min(self._work["new"], TRIAL_TOKENS)
        self._generate(prompts, new, masked=False)
        seconds = {m: sum(self._generate(prompts, new, masked=m)) for m in (False, True)}
        self._masked = min(seconds, key=seconds.get)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]]) -> tuple[int, float]:
        """(counted tokens, seconds) of the workload's kind."""
        kind, new = self._work["kind"], self._work["new"]
        if kind == "job":
            return self._job(prompts, self._batch)
        prefill, decode = self._generate(prompts, new, masked=self._masked)
        if kind == "prefill":
            return sum(map(len, prompts)), prefill
        return len(prompts) * (new - 1), decode

    def _job(self, prompts: list[list[int]], size: int) -> tuple[int, float]:
        start, new = time.perf_counter(), self._work["new"]
        ordered = sorted(prompts, key=len, reverse=True)
        for place in range(0, len(ordered), size):
            self._generate(ordered[place : place + size], new, masked=False)
        return len(prompts) * new, time.perf_counter() - start

    def _generate(self, prompts: list[list[int]], new: int, *, masked: bool) -> tuple[float, float]:
        """Seconds of prefill and of decode. `masked`: a column of padding needs the mask."""
        start = time.perf_counter()
        width = max(map(len, prompts)) + masked
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width + new, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = bool((mask == 0).any())
        cache, outputs = None, []
        begin, end = 0, width
        prefilled = start
        for step in range(new):
            result = self._model(
                input_ids=ids,
                attention_mask=mask[:, :end] if padded else None,
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids, cache = result.logits[:, -1].argmax(-1, keepdim=True), result.past_key_values
            outputs.append(ids)
            begin, end = end, end + 1
            if step == 0:
                prefilled = time.perf_counter()
        if torch.cat(outputs, 1).shape != (len(prompts), new):
            raise RuntimeError(f"want {new} tokens for each of {len(prompts)} prompts")
        return prefilled - start, time.perf_counter() - prefilled
