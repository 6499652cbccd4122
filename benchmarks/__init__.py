"""Benchmarks: every op beside its peers (peers.py) and the machine's own limits (floors.py)."""
