r"""Monitoring: the mood of reviews as they come in, with alerts about the angry ones.

    python -m lepton_jax.run --config=configs/recipes/sentiment.py
    python -m lepton_jax.run --config=configs/recipes/sentiment.py \
        --config.job.input=live.jsonl --config.job.answer="" --config.job.follow=3600

Run it in the checkout's folder. The second command goes on reading a file that others append to; it
ends with Ctrl-C, or an hour after the last line. Alerts are in
outputs/sentiment.jsonl.alerts.jsonl the moment they are raised. Explained in sentiment.md.
"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "scoring": {
            "labels": ("positive", "negative"),
            "template": "Review: {text}\nSentiment: {label}",
            "calibrate": True,
            "alert": "negative>=0.6",
        },
        "job": {
            "mode": "classify",
            "input": "configs/recipes/data/reviews.jsonl",
            "output": "outputs/sentiment.jsonl",
            "answer": "sentiment",
            "exact": False,
            "follow": 2.0,
        },
    }
