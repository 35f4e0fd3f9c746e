"""Devices that send bad updates, for `benchmarks/robust.py`."""
