"""What each way of compressing saves in time on this device, beside the ideal k/N.

    python -m lepton_jax.compress --config=configs/compress_speed.py --config.output=outputs/speed

A sweep as in compress_sweep.py, but for its last columns: times of decode at 8 rows and of prefill
of one prompt, best of receipt.repeats runs, as shares of the dense model's, which takes turns with
each. Run it on a machine that does nothing else. Quality is measured on little text. The tiles suit
both demo models; 192x32, which SmolLM2 allows too, gains more.
"""


def _layers(scheme):
    return {"rules": ("embed|head -> weights=int8", rf"layers\..* -> {scheme}")}


def get_config(arg=None):
    pruned = "weights=keep prune=magnitude sparsity=0.5 storage=sparse"
    recipes = {
        "int8": {"preset": "int8"},
        "w8a8": {"preset": "w8a8"},
        "int8-g32": {"rules": (".* -> weights=int8 group=32",)},
        "tiles-50": _layers(f"{pruned} pattern=64x32"),
        "2of4": _layers("weights=keep prune=magnitude pattern=2:4 storage=sparse"),
        "bitmask-50": _layers(pruned),
        "ffn-50": {"keep_ffn": 0.5},
        "drop-10": {"drop_layers": 10},
    }
    return {
        "model": {"path": arg or "demo:smollm2"},
        "calibration": {"windows": 2, "window_tokens": 128},
        "receipt": {"windows": 2, "window_tokens": 128, "prompts": 0, "repeats": 5},
        "sweep": {"recipes": recipes},
    }
