r"""Risk: how likely an applicant is to be a bad risk, from a few words about them.

    python -m lepton_jax.run --config=configs/recipes/credit.py

Run it in the checkout's folder. Probabilities are in outputs/credit.jsonl; the summary says how
many of the 24 known answers came out. Explained in credit.md, with what it must not be used for.
"""

_TEMPLATE = """Applicant: Steady job, own house, no debts.
Credit risk: low

Applicant: No income and many unpaid bills.
Credit risk: high

Applicant: {text}
Credit risk: {label}"""


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "scoring": {
            "labels": ("low", "high"),
            "template": _TEMPLATE,
            "calibrate": True,
        },
        "job": {
            "mode": "classify",
            "input": "configs/recipes/data/applicants.jsonl",
            "output": "outputs/credit.jsonl",
            "answer": "risk",
        },
    }
