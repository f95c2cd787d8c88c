"""Compression: parameter trees in, parameter trees out, leaf by leaf.

`rules.py` says which leaf gets what (ordered regular expressions), `quantize.py` holds the jitted
transforms, and `presets.py` names the combinations that a config may ask for. Nothing here reads
files: the loader calls the function of `presets.compressor` on each leaf right after it reached the
device.
"""
