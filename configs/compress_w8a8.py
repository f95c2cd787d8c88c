"""int8 weights, int8 activations where they cost little, by SmoothQuant and GPTQ; with a receipt.

    python -m lepton_jax.compress --config=configs/compress_w8a8.py --config.model.path=MODEL \\
        --config.output=DIR

Faster than int8 where rows are many: the products are of integers. Scales of activations are made
as they come; calibration moves their outliers into the weights and rounds these. The preset w8a8
has the same bytes and speed without calibration, at about three times the divergence; it is also
what large mixtures of experts take, whose Hessians would need more memory than they are worth:
--config.compression.preset=w8a8 "--config.compression.rules=()" --config.compression.smooth=none
"""


def get_config(arg=None):
    rules = (
        r"embed|head|layers\.\d+\.experts_down -> weights=int8",
        r"layers\.\d+\.(qkv|down) -> weights=int8 rounding=gptq",
        r"layers\..* -> weights=int8 activations=dynamic rounding=gptq",
    )
    compression = {"rules": rules, "smooth": "smoothquant"}
    return {"model": {"path": arg or "demo:smollm2"}, "compression": compression}
