"""Many recipes on one model: a table, and a page of Pareto fronts: bytes and speed against KL.

    python -m lepton_jax.compress --config=configs/compress_sweep.py --config.output=outputs/sweep
    python -m lepton_jax.compress --config=configs/compress_sweep.py:demo:gemma3-270m \\
        --config.output=outputs/gemma --config.receipt.repeats=0 --config.receipt.prompts=0

Each recipe gets a receipt in a folder of its own; an interrupted sweep goes on when the same
command is given again. With sweep.keep=true the compressed weights are kept too, and
sweep.only=int8,int4 tries these two alone. The texts are short: they tell methods apart, not their
last per cent.
"""

_TABLES = "embed|head -> weights=int8"
_LAYERS = r"layers\..* -> "
_STATIC = (  # experts have no static activations
    r"embed|head|layers\.\d+\.experts_.* -> weights=int8",
    r"layers\..* -> weights=int8 activations=static",
)
_DYNAMIC = (
    r"embed|head|layers\.\d+\.experts_down -> weights=int8",
    r"layers\.\d+\.(qkv|down) -> weights=int8 rounding=gptq",
    r"layers\..* -> weights=int8 activations=dynamic rounding=gptq",
)
_UNIFORM = (
    "weights=int8 group=32",
    "weights=int8",
    "weights=int4 group=64",
    "weights=int4 group=128",
)
_RECOVERY = {"train": "all", "steps": 60, "windows": 64, "held_out": 4, "evaluate_every": 15}


def _layers(scheme, **options):
    return {"rules": (_TABLES, _LAYERS + scheme)} | options


def _everywhere(scheme):
    return {"rules": (f".* -> {scheme}",)}


def _automatic(share, rounding=""):
    return {"auto_bytes": share, "candidates": tuple(each + rounding for each in _UNIFORM)}


def get_config(arg=None):
    recipes = {
        "int8": {"preset": "int8"},
        "int8-g32": _everywhere("weights=int8 group=32"),
        "int8-g32-gptq": {
            "rules": ("embed -> weights=int8 group=32", ".* -> weights=int8 group=32 rounding=gptq")
        },
        "w8a8": {"preset": "w8a8"},
        "w8a8-smooth-gptq": {"rules": _DYNAMIC, "smooth": "smoothquant"},
        "w8a8-static": {"rules": _STATIC},
        "w8a8-percentile": {"rules": _STATIC, "ranges": "percentile"},
        "w8a8-mse": {"rules": _STATIC, "ranges": "mse"},
        "w8a8-smoothquant": {"rules": _STATIC, "smooth": "smoothquant"},
        "fp8": {"preset": "fp8"},
        "int8-kv-int8": {"preset": "int8", "kv_dtype": "int8"},
        "int8-kv-fp8": {"preset": "int8", "kv_dtype": "float8_e4m3fn"},
        "int4": _layers("weights=int4 group=128"),
        "int4-asymmetric": _layers("weights=int4 group=128 asymmetric=true"),
        "int4-mse": _layers("weights=int4 group=128 rounding=mse"),
        "int4-awq": _layers("weights=int4 group=128 rounding=mse", smooth="awq"),
        "int4-gptq": _layers("weights=int4 group=128 rounding=gptq"),
        "magnitude-50": _layers("weights=keep prune=magnitude sparsity=0.5 storage=sparse"),
        "wanda-50": _layers("weights=keep prune=wanda sparsity=0.5 storage=sparse"),
        "sparsegpt-50": _layers("weights=keep prune=sparsegpt sparsity=0.5 storage=sparse"),
        "magnitude-24": _layers("weights=keep prune=magnitude pattern=2:4 storage=sparse"),
        "wanda-24": _layers("weights=keep prune=wanda pattern=2:4 storage=sparse"),
        "sparsegpt-24": _layers("weights=keep prune=sparsegpt pattern=2:4 storage=sparse"),
        "sparsegpt-24-int8": _layers("weights=int8 prune=sparsegpt pattern=2:4 storage=sparse"),
        "sparsegpt-48": _layers("weights=keep prune=sparsegpt pattern=4:8 storage=sparse"),
        "sparsegpt-14": _layers("weights=keep prune=sparsegpt pattern=1:4 storage=sparse"),
        "tiles-50": _layers(
            "weights=keep prune=magnitude sparsity=0.5 pattern=64x32 storage=sparse"
        ),
        "ffn-75": {"keep_ffn": 0.75},
        "kv-heads-1": {"keep_kv_heads": 1},
        "drop-4": {"drop_layers": 4},
        "uniform-int4-g64": _everywhere("weights=int4 group=64"),
        "uniform-int4-g128": _everywhere("weights=int4 group=128"),
        "auto-25": _automatic(0.252),
        "auto-20": _automatic(0.2),
        "auto-14": _automatic(0.1335),
        "uniform-int4-g64-gptq": {
            "rules": (
                "embed|head -> weights=int4 group=64",
                _LAYERS + "weights=int4 group=64 rounding=gptq",
            )
        },
        "auto-20-gptq": _automatic(0.2, " rounding=gptq"),
        "auto-14-gptq": _automatic(0.1335, " rounding=gptq"),
        "drop-4-recovered": {"drop_layers": 4, "recovery": _RECOVERY},
        "sparsegpt-24-recovered": _layers(
            "weights=keep prune=sparsegpt pattern=2:4 storage=sparse", recovery=_RECOVERY
        ),
    }
    return {
        "model": {"path": arg or "demo:smollm2"},
        "calibration": {"windows": 8, "window_tokens": 256},
        "receipt": {"windows": 8, "window_tokens": 256, "prompts": 8},
        "sweep": {"recipes": recipes},
    }
