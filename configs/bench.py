r"""Speed of SmolLM2-135M-Instruct, or of the model given as the argument, on this machine.

    python -m lepton_jax.bench --config=configs/bench.py
    python -m lepton_jax.bench --config=configs/bench.py --config.compression.preset=int8 \
        --config.bench.measure=decode_8,job

Prints one JSON line per measurement: starts in seconds, everything else in tokens/s. On two CPU
cores it takes about ten minutes, most of them for the starts and the job.
"""


def get_config(arg=None):
    return {"model": {"path": arg or "demo:smollm2"}, "compression": {"preset": "w8a8"}}
