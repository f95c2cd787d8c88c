"""Automatic mixed precision: the schemes that lose least within 20 % of the model's bytes in
float32.

    python -m lepton_jax.compress --config=configs/compress_auto.py --config.model.path=MODEL \\
        --config.output=DIR --config.compression.auto_bytes=0.2

Every weight is tried under every candidate (compression.candidates) on calibration text; the
receipt shows what each would cost and the rules that came of it. `auto_bytes=0` with
`compression.auto_kl=0.01` asks for the smallest model within a KL instead. Shares are of float32's
bytes on every device, so 0.25 would be int8, and 0.5 is what bfloat16 takes.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"auto_bytes": 0.2},
        "calibration": {"windows": 16, "window_tokens": 128},
    }
