"""Writes tests/fixtures/parity/*.json: what transformers generates from the two demo models.

It needs torch, transformers and gguf, which the package itself does not, next to this package's own
requirements; run it from the checkout's root in an environment of its own:

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install . torch transformers==5.23.0
    PYTHONPATH=. /tmp/peer/bin/python scripts/make_parity_fixtures.py

Weights are the `.gguf` files dequantized to float32 by transformers; prompts are tokenized by
lepton_jax, whose tokenizers have tests of their own. A file holds {"rows": [{"name", "prompt",
"tokens", "logprobs", "top"}]}: 48 greedy tokens whatever the end-of-text ids say, the
log-probability of each and the three likeliest [id, log-probability] in its place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lepton_jax.checkpoints.demo import demo_model
from lepton_jax.text import load as load_tokenizer

ROOT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "parity"
NEW_TOKENS = 48
TOP = 3
QUESTIONS = {
    "capital": "What is the capital of France?",
    "function": "Write a Python function that adds two numbers.",
    "chinese": "用中文介绍一下北京。",
    "count": "Count from 1 to 20.",
    "sentiment": "Is this review positive or negative? 'The soup was cold and nobody cared.'",
    "letter": "Write a short letter to my landlord about a dripping tap in the kitchen.",
}
TEXTS = {
    "story": "The lighthouse keeper had not spoken to anyone for eleven days when the boat",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    ",
    "sql": "-- customers without an order in 2023\nSELECT c.id, c.name\nFROM customers c\n",
    "numbers": "1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144, ",
    "table": "| year | rain (mm) | days |\n|---|---|---|\n| 2019 | 812.5 | 143 |\n| 2020 | 77",
    "zh_text": "从前有一个村庄，村里的人都知道河对岸住着一位老木匠。",
    "mixed": "Grüße aus Köln! Ça va? Привет, как дела? こんにちは 👋 ",
    "one": "The",
}
_PLACES = "harbour mill orchard chapel market quarry bridge school forge tower".split()
_DEEDS = "counted the boats", "mended a wheel", "read the old map", "waited for rain", "sold apples"


def long_text(sentences: int) -> str:
    """A walk through the same few places: enough repetition that far context matters."""
    lines = [
        f"On day {day} we went to the {_PLACES[day * 7 % 10]} and {_DEEDS[day * 3 % 5]}."
        for day in range(1, sentences + 1)
    ]
    return " ".join(lines) + " On day"


def prompts(tokenizer) -> dict[str, list[int]]:
    """Token ids by name: questions, through the chat template if there is one, and texts."""
    ids = {}
    for name, question in QUESTIONS.items():
        if tokenizer.chat_template:
            ids[name] = tokenizer.apply_chat([{"role": "user", "content": question}])
        else:
            ids[name] = tokenizer.encode(f"Question: {question}\nAnswer:")
    for name, text in TEXTS.items():
        ids[name] = tokenizer.encode(text) or [tokenizer.bos_id]
    ids["long"] = tokenizer.encode(long_text(14))
    # Gemma's local layers see 512 tokens: this prompt is longer, and its answer goes further.
    ids["past_window"] = tokenizer.encode(long_text(40))
    return ids


@torch.no_grad()
def greedy(model, prompt: list[int]) -> dict:
    """NEW_TOKENS steps of the likeliest token, with the log-probabilities in each place."""
    feed, past = torch.tensor([prompt]), None
    tokens, logprobs, tops = [], [], []
    for _ in range(NEW_TOKENS):
        out = model(input_ids=feed, past_key_values=past, use_cache=True)
        past = out.past_key_values
        values, ids = torch.log_softmax(out.logits[0, -1].double(), -1).topk(TOP)
        tops.append([[int(i), round(float(v), 6)] for i, v in zip(ids, values, strict=True)])
        tokens.append(tops[-1][0][0])
        logprobs.append(tops[-1][0][1])
        feed = torch.tensor([[tokens[-1]]])
    return {"tokens": tokens, "logprobs": logprobs, "top": tops}


def write(name: str, demo: str) -> None:
    path = demo_model(demo)
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    for label, prompt in prompts(tokenizer).items():
        rows.append({"name": label, "prompt": prompt, **greedy(model, prompt)})
        gap = min(top[0][1] - top[1][1] for top in rows[-1]["top"])
        text = tokenizer.decode(rows[-1]["tokens"])
        print(f"{name} {label}: {len(prompt)} tokens, least gap {gap:.5f}, {text!r}", flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (ROOT / f"{name}.json").write_text(f'{{"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    ROOT.mkdir(parents=True, exist_ok=True)
    for stem, demo in (("smollm2", "smollm2"), ("gemma3", "gemma3-270m")):
        if len(sys.argv) < 2 or stem in sys.argv[1:]:
            write(stem, demo)
