"""Benchmarks: `pytest benchmarks`, then `python -m benchmarks.report`."""
