"""2:4 sparse weights by SparseGPT: of every four inputs two are kept; embeddings and head in int8.

    python -m lepton_jax.compress --config=configs/compress_sparsegpt24.py \\
        --config.model.path=MODEL --config.output=DIR

SparseGPT (Frantar & Alistarh, 2023) lets the kept weights make up for the others. The receipt shows
what that costs, and k/N beside the measured time: where a device doesn't skip zeros, this format
saves memory and no time.
"""


def get_config(arg=None):
    sparse = r"layers\..* -> weights=keep prune=sparsegpt pattern=2:4 storage=sparse"
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"rules": ("embed|head -> weights=int8", sparse)},
    }
