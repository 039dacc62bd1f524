"""Machine code of the GPU kernels, read and counted."""
