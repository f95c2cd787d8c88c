"""Work with an end: rows in, rows out, in order and resumable.

`rows.py` reads rows, `session.py` turns prompts into answers on an engine, `generate.py` does a
whole file, `output.py` keeps what is done, `summary.py` says what it cost. The engine is given:
only its protocol is known here (`add_request`, `step`, `abort`).
"""
