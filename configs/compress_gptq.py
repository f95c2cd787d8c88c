"""int4 weights in groups of 128 inputs by GPTQ; embeddings and head in int8.

    python -m lepton_jax.compress --config=configs/compress_gptq.py --config.model.path=MODEL \\
        --config.output=DIR

GPTQ (Frantar et al., 2023) rounds one input after the other and lets the next make up for the
error, so it needs text: 64 windows of 512 tokens, by default of the text that ships.
"""


def get_config(arg=None):
    rules = ("embed|head -> weights=int8", r"layers\..* -> weights=int4 group=128 rounding=gptq")
    return {"model": {"path": arg or "demo:smollm2"}, "compression": {"rules": rules}}
