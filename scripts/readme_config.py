"""Writes README's table of config fields from `lepton_jax/config.py`, where each field has its doc.

    .venv/bin/python scripts/readme_config.py

Run it after a change of a field; `tests/test_house.py` fails while the table is another one.
"""

import dataclasses
from pathlib import Path

from lepton_jax.config import RunConfig

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- config table: scripts/readme_config.py -->", "<!-- end of config table -->"


def config_table() -> str:
    """Markdown, a row for each field of each section."""
    rows = ["| field | default | what it is |", "|---|---|---|"]
    for section in dataclasses.fields(RunConfig):
        if section.metadata:  # a field of its own
            rows.append(_row(section, section.name))
        else:
            fields = dataclasses.fields(section.default_factory)
            rows += [_row(field, f"{section.name}.{field.name}") for field in fields]
    return "\n".join(rows)


def _row(field: dataclasses.Field, name: str) -> str:
    made = field.default is dataclasses.MISSING
    default = field.default_factory() if made else field.default
    doc = field.metadata["doc"].replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | `{default!r}` | {doc} |"


def with_table(readme: str) -> str:
    """The README's text with the table of today between its two marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{config_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
