"""Tables and figures from rows of results: `python -m benchmarks.report`."""
