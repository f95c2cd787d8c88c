"""Many replicas and many hosts: who gets which row, a pool that looks like one engine, and hosts
that run one program together.

`balancer.py` decides, `ledger.py` keeps the accounts, `simulator.py` tries both on hundreds of
replicas that don't exist, `pool.py` drives real ones. Read next: `pool.py`.
"""
