"""One short file per family: how its configs are read and how its weights are called.

To add one, copy the family that it resembles most, list it in `registry.py`, add a tiny model to
`scripts/make_model_fixtures.py` and a released config to the tests. Read next: `llama.py`.
"""
