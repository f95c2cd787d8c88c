"""Pages for people: one file each, without scripts or outside parts.

`page.py` is what every page has, `svg_plots.py` its plots. What a page shows is its room's
business: receipts in `lepton_jax/compression`, runs in `lepton_jax/jobs`.
"""
