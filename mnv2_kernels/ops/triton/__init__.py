"""The block in Triton: one kernel for fp16, bf16 and fp32, its configurations and its launch."""

version: str | None
missing: str | None
try:
    from triton import __version__ as version

    from .configs import precision
    from .launch import inverted_residual

    missing = None
except ImportError as error:
    version = None
    missing = f"Triton is not installed ({error}); on Linux `pip install triton` brings it"

    def inverted_residual(*args):
        """Stands in for the launch where there is no Triton."""
        raise RuntimeError(f"inverted_residual: {missing}")


__all__ = ["inverted_residual", "missing", "precision", "version"]
