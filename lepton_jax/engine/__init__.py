"""Requests become tokens: scheduler, pages, packing, device steps, sampling, runner, and the loop.

Start with `loop.py`: `Engine.step` is the whole beat in three lines.
"""
