"""What `benchmarks/aggregate.py` joins, and how it measures."""
