"""Language models: one decoder, thin families.

`registry.py` finds a file's family and gives a `ModelConfig` and a key map; `build.py` turns the
config into parameter specs and, given leaves, into the decoder of `decoder.py`. Weight files are
read by `lepton_jax/checkpoints`. Read `decoder.py` first: it opens with the alphabet.
"""
