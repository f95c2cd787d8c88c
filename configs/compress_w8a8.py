"""int8 weights, and int8 activations where they cost little, with a receipt.

    python -m lepton_jax.compress --config=configs/compress_w8a8.py --config.model.path=MODEL \\
        --config.output=DIR

Faster than int8 where rows are many: the products are of integers.
"""


def get_config(arg=None):
    return {"model": {"path": arg or "demo:smollm2"}, "compression": {"preset": "w8a8"}}
