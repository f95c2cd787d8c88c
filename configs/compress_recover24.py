"""2:4 sparse weights by SparseGPT, then recovered: trained to predict what the dense model does.

    python -m lepton_jax.compress --config=configs/compress_recover24.py --config.output=DIR

The zeros stay zeros and the format stays the same: only the kept values, the norms and the scales
of int8 tables are trained. An interrupted command goes on where it was when it is given again. The
receipt has the quality before and after, and the share of the gap in perplexity that was closed.
"""


def get_config(arg=None):
    sparse = r"layers\..* -> weights=keep prune=sparsegpt pattern=2:4 storage=sparse"
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"rules": ("embed|head -> weights=int8", sparse)},
        "recovery": {"train": "all", "minutes": 20.0},
    }
