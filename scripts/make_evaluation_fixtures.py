"""Writes tests/fixtures/evaluation/smollm2.json: what lm_eval's Hugging Face backend makes of the
tasks that lie beside it.

It needs torch, transformers, gguf and lm-eval next to this package's own requirements; run it from
the checkout's root in an environment of its own:

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install . torch transformers==5.23.0 lm-eval
    PYTHONPATH=. /tmp/peer/bin/python scripts/make_evaluation_fixtures.py

Weights are the `.gguf` file dequantized to float32 by transformers, in windows of 64 tokens. The
tokenizer is lepton_jax's behind transformers' interface, because transformers' own conversion of
this file spells numbers differently. The file holds, by task, the numbers of each request in order.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from lepton_jax.checkpoints.demo import demo_model
from lepton_jax.text import load as load_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "evaluation"
WINDOW = 64


class OurIds(HFLM):
    """lm_eval's backend with lepton_jax's ids."""

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return ours.encode(string, add_special=add_special_tokens is not False)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, **kwargs):
        (text,) = strings  # batches of one need no padding
        ids = torch.tensor([ours.encode(text)])
        return ids, torch.ones_like(ids)


path = demo_model("smollm2")
ours = load_tokenizer(path)
model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
).eval()
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
backend = OurIds(pretrained=model, tokenizer=tokenizer, max_length=WINDOW, batch_size=1)
found = simple_evaluate(
    model=backend,
    tasks=["lepton_choices", "lepton_perplexity", "lepton_answers"],
    task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
    bootstrap_iters=0,
)
lines = {
    task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
    for task, samples in found["samples"].items()
}
results = {
    task: {name: value for name, value in scores.items() if isinstance(value, float)}
    for task, scores in found["results"].items()
}
(FOLDER / "smollm2.json").write_text(json.dumps({"resps": lines, "results": results}) + "\n")
