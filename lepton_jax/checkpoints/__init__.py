"""Checkpoints: the only room that reads or writes weight files.

`load.load(path)` is the door in; `orbax_store.save` the door out. Behind them, `safetensors_files.py`
and `gguf_files.py` give named arrays one at a time (the protocol is in `source.py`), `demo.py`
fetches the small demo models. Everything that is wrong with a file ends in a `CheckpointError`.
"""
