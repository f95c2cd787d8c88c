"""Many recipes on one model: a table, and a page of Pareto fronts: bytes and speed against KL.

    python -m lepton_jax.compress --config=configs/compress_sweep.py --config.output=outputs/sweep

Each recipe gets a receipt in a folder of its own; an interrupted sweep goes on when the same
command is given again. With sweep.keep=true the compressed weights are kept too.
"""

_TABLES = "embed|head -> weights=int8"
_LAYERS = r"layers\..* -> "


def _layers(scheme, **options):
    return {"rules": (_TABLES, _LAYERS + scheme)} | options


def get_config(arg=None):
    recipes = {
        "int8": {"preset": "int8"},
        "w8a8": {"preset": "w8a8"},
        "w8a8-static": _layers("weights=int8 activations=static"),
        "w8a8-smoothquant": _layers("weights=int8 activations=static", smooth="smoothquant"),
        "fp8": {"preset": "fp8"},
        "int8-gptq": {"rules": ("embed|head|layers.* -> weights=int8 rounding=gptq",)},
        "int8-g32": {"rules": (".* -> weights=int8 group=32",)},
        "int4": _layers("weights=int4 group=128"),
        "int4-mse": _layers("weights=int4 group=128 rounding=mse"),
        "int4-awq": _layers("weights=int4 group=128 rounding=mse", smooth="awq"),
        "int4-gptq": _layers("weights=int4 group=128 rounding=gptq"),
        "magnitude-50": _layers("weights=keep prune=magnitude sparsity=0.5 storage=sparse"),
        "wanda-50": _layers("weights=keep prune=wanda sparsity=0.5 storage=sparse"),
        "sparsegpt-50": _layers("weights=keep prune=sparsegpt sparsity=0.5 storage=sparse"),
        "magnitude-24": _layers("weights=keep prune=magnitude pattern=2:4 storage=sparse"),
        "wanda-24": _layers("weights=keep prune=wanda pattern=2:4 storage=sparse"),
        "sparsegpt-24": _layers("weights=keep prune=sparsegpt pattern=2:4 storage=sparse"),
    }
    return {"model": {"path": arg or "demo:smollm2"}, "sweep": {"recipes": recipes}}
