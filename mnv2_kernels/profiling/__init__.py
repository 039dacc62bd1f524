"""Measuring: time, allocations, variants, the paper's Table 3."""
