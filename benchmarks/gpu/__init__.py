"""The GPU suite and its parts."""
