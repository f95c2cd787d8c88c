"""Attention per platform, each backend beside the plain reference that it is tested against.

Read `attention.py` first: the batch that a step describes and the choice of a backend.
"""
