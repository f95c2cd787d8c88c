r"""Recommendation: which of four products fits a wish best.

    python -m lepton_jax.run --config=configs/recipes/products.py

Run it in the checkout's folder. Rankings are in outputs/products.jsonl; the summary says how often
the product that was bought came first. Explained in products.md.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "scoring": {"template": "A customer asked for {query}. We recommended: {candidate}"},
        "job": {
            "mode": "rank",
            "input": "configs/recipes/data/products.jsonl",
            "output": "outputs/products.jsonl",
            "answer": "bought",
        },
    }
