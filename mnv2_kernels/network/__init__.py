"""Whole networks: read, lowered, laid out, encoded, run."""
