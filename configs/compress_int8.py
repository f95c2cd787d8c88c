"""SmolLM2-135M-Instruct, or the model given, in int8 with one scale per output, and its receipt.

    python -m lepton_jax.compress --config=configs/compress_int8.py --config.output=outputs/int8
    python -m lepton_jax.compress --config=configs/compress_int8.py \\
        --config.model.path=/models/Llama-3.1-8B --config.output=/models/Llama-3.1-8B-int8

Takes three to four minutes on two CPU cores, most of them for the receipt's measurements.
"""


def get_config(arg=None):
    return {"model": {"path": arg or "demo:smollm2"}, "compression": {"preset": "int8"}}
