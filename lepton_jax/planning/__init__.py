"""What a model will need and how fast it can be, known before a device is rented.

`memory.py` and `roofline.py` are arithmetic on shapes; `programs.py` compiles the engine's real
programs for chips that aren't there (`topology.py`) and `traffic.py` reads what came out. `plan.py`
puts both together, `search.py` looks for the smallest slice. Nothing here holds a weight.
"""
