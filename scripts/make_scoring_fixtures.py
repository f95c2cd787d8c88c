"""Writes tests/fixtures/scoring/smollm2.json: what transformers makes of texts, choices and hidden
states.

It needs torch, transformers and gguf, which the package itself does not, next to this package's own
requirements; run it from the checkout's root in an environment of its own:

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install . torch transformers==5.23.0
    PYTHONPATH=. /tmp/peer/bin/python scripts/make_scoring_fixtures.py

Weights are the `.gguf` file dequantized to float32 by transformers; texts are tokenized by
lepton_jax, whose tokenizers have tests of their own. The file holds {"texts": [{"text",
"logprobs"}], "choices": [{"context", "choices", "logprobs": [[...] a choice]}], "hidden": [{"text",
"last", "mean"}], "layers": [{"text", "0", "15"}]}. A text is scored after the beginning of text;
contexts and choices are tokenized as lm-evaluation-harness does it; hidden states are those after
the final norm, and in "layers" the last token's after so many layers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lepton_jax.checkpoints.demo import demo_model
from lepton_jax.text import load as load_tokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
TEXTS, SHORTEST, LONGEST = 64, 20, 200  # tokens
HIDDEN = 8
LAYERS = (0, 15)  # of two texts
CHOICES = [
    ("The capital of France is", [" Berlin", " Paris", " a large city in Germany"]),
    ("Question: What do bees make?\nAnswer:", [" honey", " milk", " bricks and mortar", " hon"]),
    ("Review: The soup was cold and nobody cared.\nSentiment:", [" positive", " negative"]),
    ("She put the kettle on the stove and waited for the water to ", ["boil.", "freeze.", "sing."]),
    ("2 + 2 =", [" 3", " 4", " 5", " 22"]),
    ("Der Zug nach Köln fährt um", [" acht Uhr ab.", " Käse.", " acht Uhr an."]),
    ("", ["Once upon a time", "zebra zebra zebra"]),
    ("def add(a, b):\n    return", [" a + b", " a - b", " None", "\n"]),
]


def pieces_of(prose: str, tokenizer) -> list[str]:
    """TEXTS pieces of the prose, of SHORTEST to LONGEST tokens, in whole words."""
    draw, words, found = random.Random(5), prose.split(" "), []
    while len(found) < TEXTS:
        start = draw.randrange(len(words) - 200)
        text = " ".join(words[start : start + draw.randint(15, 160)]).strip()
        if SHORTEST <= len(tokenizer.encode(text)) <= LONGEST:
            found.append(text)
    return found


def pair_ids(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness's TemplateLM._encode_pair and its rule for an empty context."""
    if context == "":
        return [tokenizer.bos_id], tokenizer.encode(continuation)
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, start = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return start, whole[len(start) :]


@torch.no_grad()
def logprobs(model, context: list[int], continuation: list[int]) -> list[float]:
    logits = model(torch.tensor([context + continuation])).logits[0].double()
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    chosen = torch.log_softmax(logits, -1)[list(places), continuation]
    return [round(value, 6) for value in chosen.tolist()]


@torch.no_grad()
def hidden(model, ids: list[int]) -> dict[str, list[float]]:
    states = model.model(torch.tensor([ids])).last_hidden_state[0].double()
    pooled = {"last": states[-1], "mean": states.mean(0)}
    return {name: rounded(state) for name, state in pooled.items()}


@torch.no_grad()
def layers(model, ids: list[int]) -> dict[str, list[float]]:
    states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return {str(layer): rounded(states[layer][0, -1]) for layer in LAYERS}


def rounded(state: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in state.double().tolist()]


def main() -> None:
    path = demo_model("smollm2")
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    pieces = pieces_of((FIXTURES / "parity" / "prose.txt").read_text(), tokenizer)
    texts = [
        {"text": text, "logprobs": logprobs(model, [tokenizer.bos_id], tokenizer.encode(text))}
        for text in pieces
    ]
    choices = [
        {
            "context": context,
            "choices": found,
            "logprobs": [logprobs(model, *pair_ids(tokenizer, context, one)) for one in found],
        }
        for context, found in CHOICES
    ]
    states = [{"text": text, **hidden(model, tokenizer.encode(text))} for text in pieces[:HIDDEN]]
    inner = [{"text": text, **layers(model, tokenizer.encode(text))} for text in pieces[:2]]
    found = {"texts": texts, "choices": choices, "hidden": states, "layers": inner}
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
        for name, rows in found.items()
    ]
    (FIXTURES / "scoring").mkdir(exist_ok=True)
    (FIXTURES / "scoring" / "smollm2.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
