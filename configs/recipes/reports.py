r"""Reports: each row of a table becomes a JSON object of a fixed schema.

    python -m lepton_jax.run --config=configs/recipes/reports.py

Run it in the checkout's folder. Reports are in outputs/reports.jsonl, each in `text`; the summary
says how many of their fields are right. Needs llguidance: pip install -e ".[guided]". Explained in
reports.md.
"""

_SCHEMA = {
    "type": "object",
    "properties": {
        "shop": {"type": "string", "maxLength": 20},
        "last_month": {"type": "integer", "minimum": 0, "maximum": 9999},
        "this_month": {"type": "integer", "minimum": 0, "maximum": 9999},
        "trend": {"enum": ["up", "down", "flat"]},
    },
    "required": ["shop", "last_month", "this_month", "trend"],
    "additionalProperties": False,
}


def get_config(arg=None):
    return {
        "model": {"path": arg or "demo:smollm2"},
        "compression": {"preset": "w8a8"},
        "sampling": {"json_schema": _SCHEMA, "max_tokens": 96},
        "job": {
            "input": "configs/recipes/data/shops.jsonl",
            "output": "outputs/reports.jsonl",
            "answer": "expected",
        },
    }
