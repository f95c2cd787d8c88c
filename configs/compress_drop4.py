"""Four layers removed, those of least influence, and the rest recovered by distillation.

    python -m lepton_jax.compress --config=configs/compress_drop4.py --config.output=DIR
    python -m lepton_jax.compress --config=configs/compress_drop4.py --config.output=DIR \\
        --config.compression.preset=w8a8

The result is a smaller dense model, faster on every device; a preset or rules quantize what is
left. The receipt has the measured speed beside the ideal, k/N.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"drop_layers": 4},
        "recovery": {"train": "all", "minutes": 20.0},
    }
