"""float8 (e4m3) weights, and float8 activations where they cost little, with a receipt.

    python -m lepton_jax.compress --config=configs/compress_fp8.py --config.model.path=MODEL \\
        --config.output=DIR

For devices that multiply float8; a CPU widens it, so that it saves memory there and no time.
"""


def get_config(arg=None):
    return {"model": {"path": arg or "demo:smollm2"}, "compression": {"preset": "fp8"}}
