r"""Customer service: which of five teams a message belongs to.

    python -m lepton_jax.run --config=configs/recipes/intents.py

Run it in the checkout's folder. Answers are in outputs/intents.jsonl, with the probability of each
team; the summary says how many of the 40 known answers came out. Explained in intents.md.
"""

_TEMPLATE = """Sort messages of customers.

Message: My package has not arrived.
Topic: delivery

Message: Pay me back what the chair cost.
Topic: refund

Message: I can't get into my account.
Topic: password

Message: The total on the bill is wrong.
Topic: invoice

Message: You are hopeless and I am angry.
Topic: complaint

Message: {text}
Topic: {label}"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "scoring": {
            "labels": ("delivery", "refund", "password", "invoice", "complaint"),
            "template": _TEMPLATE,
            "calibrate": True,
        },
        "job": {
            "mode": "classify",
            "input": "configs/recipes/data/intents.jsonl",
            "output": "outputs/intents.jsonl",
            "answer": "intent",
        },
    }
