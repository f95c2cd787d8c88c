r"""Llama 3.1 70B in int8 on eight chips: a plan, without weights and without a TPU.

    python -m lepton_jax.plan --config=configs/llama3_70b.py --topology=v5e:2x4
    python -m lepton_jax.plan --config=configs/llama3_70b.py:published:qwen3-32b \
        --topology=v6e:2x2 --config.mesh.model=4
    python -m lepton_jax.plan --config=configs/llama3_70b.py --search --config.plan.target=2000

The first prints memory, traffic, collectives and the roofline of a step; compiling both programs
takes about a minute (`pip install libtpu`). The argument is a model: published:NAME, a config.json
or a checkpoint.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "published:llama-3.1-70b"},
        "compression": {"preset": "int8"},
        "mesh": {"model": 8},
        "engine": {"rows": 32, "max_len": 2048},
    }
