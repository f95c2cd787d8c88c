r"""Reports: each row of a table becomes a JSON object of a fixed schema.

    python -m lepton_jax.run --config=configs/recipes/reports.py

Run it in the checkout's folder. Reports are in outputs/reports.jsonl, each in `text`; the summary
says how many of their fields are right. Needs llguidance: pip install -e ".[guided]". Explained in
reports.md.
"""

_TEMPLATE = """Write the report of one shop as JSON.

Shop: Lakeside. Sales last month: 40. Sales this month: 64. Trend: up.
{{"shop": "Lakeside", "last_month": 40, "this_month": 64, "trend": "up"}}

Shop: Castle. Sales last month: 92. Sales this month: 71. Trend: down.
{{"shop": "Castle", "last_month": 92, "this_month": 71, "trend": "down"}}

Shop: {shop}. Sales last month: {last_month}. Sales this month: {this_month}. Trend: {trend}.
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
            "input": "configs/recipes/data/shops.csv",
            "output": "outputs/reports.jsonl",
            "columns": "id=shop,shop",
            "template": _TEMPLATE,
            "answer": "expected",
        },
    }
