"""What compute-sanitizer watches: our op on small shapes, or a kernel that stores out of bounds.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized --backend cuda
    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized --seeded-bug

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that a byte
after its end is not one of its neighbour's.
"""

import argparse
from dataclasses import replace

import torch
import triton
import triton.language as tl

from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.block.config import BlockConfig, same_padding
from mnv2_kernels.ops import reference
from mnv2_kernels.ops.backends import ran

_PLAIN = BlockConfig(24, 72, 24, residual=True)
# (block, height, width, batch): sizes that cut tiles short in every direction.
SHAPES = [
    (_PLAIN, 7, 9, 3),
    (_PLAIN, 1, 1, 1),
    (_PLAIN, 2, 33, 1),
    (_PLAIN, 33, 2, 1),
    (BlockConfig(16, 96, 24, stride=2), 8, 8, 2),
    (BlockConfig(16, 96, 24, stride=2), 7, 5, 2),
    (BlockConfig(32, 192, 64, stride=2), 14, 14, 1),
    (BlockConfig(64, 384, 96), 7, 7, 1),
    (BlockConfig(96, 576, 160, stride=2), 6, 6, 1),
    (BlockConfig(160, 960, 160, residual=True), 7, 7, 1),
    (BlockConfig(160, 960, 320), 4, 3, 2),
    (BlockConfig(32, 32, 16, expansion=False), 12, 11, 2),
    (BlockConfig(5, 19, 7), 6, 5, 1),
    (BlockConfig(1, 3, 1, residual=True), 3, 3, 1),
    (BlockConfig(33, 65, 31), 5, 6, 1),
    (BlockConfig(17, 17, 33, expansion=False, stride=2), 9, 4, 1),
    (replace(_PLAIN, kernel_size=5, padding=same_padding(5)), 9, 8, 1),
    (BlockConfig(40, 120, 48, stride=2, kernel_size=5, padding=(1, 1, 2, 2)), 10, 10, 1),
    (replace(_PLAIN, dilation=2, padding=same_padding(3, 2)), 8, 9, 1),
    (replace(_PLAIN, padding=(0, 0, 0, 0), residual=False), 5, 7, 1),
    (replace(_PLAIN, padding=(2, 0, 0, 2), residual=False), 4, 6, 33),
    # For the CUDA kernel of large images; with padding on one side and none.
    (_PLAIN, 21, 23, 2),
    (BlockConfig(8, 48, 16, stride=2, padding=(0, 0, 1, 1)), 42, 46, 3),
    (BlockConfig(16, 96, 24, stride=2), 41, 43, 1),
    (BlockConfig(24, 144, 32, stride=2), 50, 40, 1),
    (BlockConfig(32, 192, 32, residual=True), 28, 20, 1),
    (BlockConfig(32, 40, 8, padding=(0, 0, 0, 0)), 33, 25, 2),
]
# Triton, which compiles each block for seconds, has these alone.
OF_TRITON = len(SHAPES)
SHAPES += [
    (BlockConfig(16, 16, 8, expansion=False), 5, 17, 3),
    (BlockConfig(24, 24, 24, 2, expansion=False, kernel_size=5, padding=(2,) * 4), 11, 7, 2),
    (BlockConfig(8, 8, 40, expansion=False, dilation=2, padding=(2,) * 4), 6, 6, 1),
    (BlockConfig(40, 240, 40, kernel_size=5, padding=(2,) * 4, residual=True), 13, 9, 1),
    (BlockConfig(80, 480, 112, kernel_size=5, padding=(2,) * 4), 5, 5, 2),
    (BlockConfig(112, 672, 192, 2, kernel_size=5, padding=(1, 1, 2, 2)), 6, 4, 1),
    (BlockConfig(64, 384, 64, dilation=2, padding=(2,) * 4, residual=True), 7, 6, 2),
    (BlockConfig(8, 16, 8, kernel_size=5, dilation=2, padding=(4,) * 4, residual=True), 9, 3, 1),
    (BlockConfig(7, 33, 9, stride=2, padding=(0, 1, 1, 0)), 8, 5, 3),
    (BlockConfig(31, 31, 31, residual=True, expansion=False), 3, 10, 2),
    (BlockConfig(3, 100, 2, kernel_size=5, padding=(4, 0, 0, 4)), 5, 6, 1),
    (BlockConfig(72, 24, 136), 2, 2, 5),
    (BlockConfig(32, 192, 32, residual=True), 1, 40, 1),
    (BlockConfig(16, 64, 24, stride=2), 64, 33, 1),
    (BlockConfig(24, 96, 24, padding=(1, 0, 0, 1)), 30, 29, 2),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What is called of each backend, as (number of a shape, dtype). Triton has one kernel for all of
# them; which CUDA kernel runs depends on both.
CALLS = {
    "triton": [(i, DTYPES[i % len(DTYPES)]) for i in range(OF_TRITON)],
    "cuda": [(i, dtype) for i in range(len(SHAPES)) for dtype in DTYPES],
}
# Of the largest value, in units of the dtype's spacing at 1.
TOLERANCE = 16


def weights_of(config: BlockConfig, dtype: torch.dtype) -> FoldedWeights:
    """Random weights with which values of x keep their scale; biases are float32."""
    c_in, hidden, c_out = config.in_channels, config.hidden_channels, config.out_channels
    kernel = config.kernel_size
    expand = torch.randn(c_in, hidden) * 3 / c_in**0.5
    return FoldedWeights(
        w_expand=expand.to(dtype) if config.expansion else None,
        b_expand=torch.randn(hidden) + 1 if config.expansion else None,
        w_dw=(torch.randn(kernel, kernel, hidden) / kernel).to(dtype),
        b_dw=torch.randn(hidden) + 1,
        w_project=(torch.randn(hidden, c_out) / hidden**0.5).to(dtype),
        b_project=torch.randn(c_out),
    )


def check(number: int, dtype: torch.dtype, device: str, backend: str) -> None:
    """Run one of SHAPES on the device, against the reference in float64 on the CPU.

    Raises:
        AssertionError: the result is wrong, or another backend has made it.
    """
    config, height, width, batch = SHAPES[number]
    torch.manual_seed(number)
    x = torch.randn(batch, config.in_channels, height, width).to(dtype)
    weights = weights_of(config, dtype)
    settings = {
        name: getattr(config, name) for name in ("stride", "padding", "dilation", "residual")
    }
    moved = weights.to(device)
    before = ran()
    y = inverted_residual(x.to(device), moved, backend=backend, **settings).cpu().double()
    assert ran() - before == {backend: 1}, f"{backend} must have run, got {ran() - before}"
    truth = reference.inverted_residual(x.double(), weights.to(torch.float64), **settings)
    error = ((y - truth).abs().max() / truth.abs().max()).item()
    allowed = TOLERANCE * torch.finfo(dtype).eps
    assert error <= allowed, f"{config.name}, {dtype}: error must be {allowed:.1e}, got {error:.1e}"


@triton.jit
def store_one_too_many(y, length, BLOCK: tl.constexpr):
    """Writes one element past the end of y, which a working sanitizer reports."""
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, 1.0, mask=offsets <= length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeded-bug", action="store_true", help="store out of bounds instead")
    parser.add_argument("--backend", choices=CALLS, default="cuda")
    parser.add_argument("--every", type=int, default=1, help="leave out all calls but one of these")
    options = parser.parse_args()
    calls = [] if options.seeded_bug else CALLS[options.backend][:: options.every]
    if options.seeded_bug:
        y = torch.empty(1000, device="cuda")
        store_one_too_many[(1,)](y, y.numel(), BLOCK=1024)
    for number, dtype in calls:
        check(number, dtype, "cuda", options.backend)
    torch.cuda.synchronize()
    print(f"{len(calls)} calls")


if __name__ == "__main__":
    main()
