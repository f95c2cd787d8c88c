"""Compression: parameter trees in, parameter trees out, leaf by leaf.

`scheme.py` says what may become of a weight, `rules.py` which weight gets what (ordered regular
expressions), `presets.py` names combinations, and `recipe.py` is all that a config asks for. Of the
methods, `quantize.py` and `prune.py` need nothing but the weight, and the loader applies them as
weights stream in; `gptq.py`, `sparsegpt.py`, `wanda.py` and `smooth.py` need activations, which
`calibrate.py` gathers layer by layer. `structured.py` removes whole layers, heads, channels and
experts before that, `recover.py` trains the result to predict what the dense model does. What it
cost is measured by `quality.py` and told by `receipt.py`. Weight files are read and written by
`lepton_jax/checkpoints`.
"""
