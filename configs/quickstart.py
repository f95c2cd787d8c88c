"""SmolLM2-135M-Instruct in int8 answers the 32 prompts that ship with the checkout.

    python -m lepton_jax.run --config=configs/quickstart.py

Run it in the checkout's folder. The first run fetches the model (98 MB) and compiles for about a
minute; later ones start in seconds. Answers are in outputs/quickstart.jsonl, one row each, in the
order of the prompts. A model of this size chats fluently and is often wrong about facts.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"preset": "int8"},
        "sampling": {"max_tokens": 96},
        "job": {"input": "configs/data/quickstart.jsonl", "output": "outputs/quickstart.jsonl"},
    }
