"""Work with an end: rows in, rows out, resumable.

`driver.py` does a whole file in any mode (`modes.py`, `mode_for.py`): `files/` and `rows.py` read
rows, the mode's session asks the engine, `framing.py` and `output.py` write and keep what is done,
`summary.py` and `report_page.py` say what it cost. `session.py` turns prompts into answers. The
engine is given: only its protocol is known here.
"""
