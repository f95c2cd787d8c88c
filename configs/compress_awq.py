"""int4 weights in groups of 128 inputs with AWQ's scales and clipping; embeddings and head in int8.

    python -m lepton_jax.compress --config=configs/compress_awq.py --config.model.path=MODEL \\
        --config.output=DIR

AWQ (Lin et al., 2024) folds scales into neighbouring weights that protect what large activations
meet; the search for them needs text, by default the one that ships.
"""


def get_config(arg=None):
    rules = ("embed|head -> weights=int8", r"layers\..* -> weights=int4 group=128 rounding=mse")
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"rules": rules, "smooth": "awq"},
    }
