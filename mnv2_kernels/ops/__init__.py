"""The op: contract, reference, gradients, backends, Triton kernels."""
