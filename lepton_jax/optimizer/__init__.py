"""The optimizer: chooses an engine's parameters before a job and corrects them while it runs.

Before: `search.py` tries candidates on a sample of the rows, `profile.py` keeps the winner. While:
`feedback.py` listens to an engine and sets its knobs by what `controller.py` decides. Both reckon
with `costs.py`. The face of it all is `lepton_optimizer.py`.
"""
