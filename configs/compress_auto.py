"""Automatic mixed precision: the schemes that lose least within 20 % of the model's bytes in
float32.

    python -m lepton_jax.compress --config=configs/compress_auto.py --config.model.path=MODEL \\
        --config.output=DIR --config.compression.auto_bytes=0.2

Every weight is tried under every candidate (compression.candidates) on calibration text, rounded to
nearest, and what is chosen is rounded by GPTQ, which usually loses less; the receipt shows what
each would cost and the rules that came of it. `auto_bytes=0` with `compression.auto_kl=0.01` asks
for the smallest model within a KL instead. Shares are of float32's bytes on every device, so 0.25
would be int8, and 0.5 is what bfloat16 takes.
"""

_FORMATS = ("int8 group=32", "int8", "int4 group=32", "int4 group=64", "int4 group=128")


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {
            "auto_bytes": 0.2,
            "candidates": tuple(f"weights={each} rounding=gptq" for each in _FORMATS),
        },
    }
