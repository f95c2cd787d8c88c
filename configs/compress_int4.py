"""int4 weights in groups of 128 inputs, rounded to nearest; embeddings and head in int8.

    python -m lepton_jax.compress --config=configs/compress_int4.py --config.model.path=MODEL \\
        --config.output=DIR

Needs no calibration text, and is the baseline for compress_gptq.py and compress_awq.py.
"""


def get_config(arg=None):
    rules = ("embed|head -> weights=int8", r"layers\..* -> weights=int4 group=128")
    return {"model": {"path": arg or "demo:smollm2"}, "compression": {"rules": rules}}
