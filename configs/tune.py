r"""Tunes SmolLM2-135M-Instruct for the prompts that ship with the checkout, on this machine.

    python -m lepton_jax.tune --config=configs/tune.py
    python -m lepton_jax.run --config=configs/tune.py      # says which profile it takes

For your own, both with --config.model.path=MODEL --config.job.input=prompts.jsonl. Compression is
among what is tried, as far as it diverges by at most 0.03 nats a token from the uncompressed model.
Prints a table of candidates, predicted and measured, and the effect. Some minutes on two CPU cores.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "sampling": {"max_tokens": 96},
        "job": {"input": "configs/data/quickstart.jsonl", "output": "outputs/tuned.jsonl"},
        "optimizer": {"max_kl": 0.03},
    }
