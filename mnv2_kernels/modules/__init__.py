"""Modules that run the op where that is exact."""
