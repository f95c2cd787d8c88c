"""Checkpoints: the only room that reads or writes weight files.

`load.load(path)` is the door in, `orbax_store.save` the door out. Behind them the modules
`safetensors_files.py` and `gguf_files.py` describe the arrays of a file, `source.py` reads them one
at a time, and `demo.py` fetches small demo models. Whatever is wrong with a file ends in a
`CheckpointError`. Read `load.py` next.
"""
