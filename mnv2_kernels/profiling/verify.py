"""Do the kernels give the right numbers on this machine? Checked against the float64 reference."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from ..block.config import NO_CLIP, RELU6, BlockConfig, mobilenet_v2_block_inputs
from ..block.fold import FoldedWeights
from ..ops import reference
from ..ops.backends import BACKENDS
from ..ops.inverted_residual import inverted_residual

# What the 17 blocks leave out: odd sizes and channels, borders wider than the image, kernel size
# 5, TensorFlow's padding, dilation. (block, batch, height, width)
ODD_SHAPES = (
    (BlockConfig(3, 17, 5), 1, 1, 1),
    (BlockConfig(7, 7, 9, stride=2, expansion=False), 2, 5, 8),
    (BlockConfig(33, 65, 33, residual=True), 3, 9, 7),
    (BlockConfig(16, 100, 24, stride=2, padding=(0, 0, 1, 1)), 2, 30, 18),
    (BlockConfig(24, 144, 40, stride=2, kernel_size=5, padding=(1, 1, 2, 2)), 1, 34, 20),
    (BlockConfig(40, 240, 40, kernel_size=5, padding=(2,) * 4, residual=True), 1, 3, 31),
    (BlockConfig(20, 120, 20, dilation=2, padding=(2,) * 4, residual=True), 1, 13, 17),
)


@dataclass(frozen=True)
class Result:
    """One block on one backend, or one model in one execution: the largest error of it and of plain
    PyTorch, and what is wrong.
    """

    block: str
    shape: tuple[int, ...]
    dtype: str
    backend: str
    error: float
    plain_error: float
    wrong: str | None


def kernels(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[list[str], list[str]]:
    """(names of the backends with a kernel that runs on dtype there, why the others cannot)."""
    x = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    # On a GPU every kernel is of interest; on the CPU, an interpreter would take all day.
    reasons = {
        b.name: b.why_refused(x) if x.is_cuda else b.why_not(x)
        for b in BACKENDS
        if b.name != "reference"
    }
    running = [name for name, reason in reasons.items() if reason is None]
    return running, [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def verify(
    backends: list[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Result]:
    """Run the 17 blocks of MobileNetV2 at 224x224 and the odd shapes on each backend."""
    shapes = [(b, 1, size, size) for b, size in mobilenet_v2_block_inputs()]
    for i, (block, *batch_hw) in enumerate((*shapes, *ODD_SHAPES)):
        x, weights = example(block, *batch_hw, seed=i, dtype=dtype)
        settings = {
            name: getattr(block, name) for name in ("stride", "padding", "dilation", "residual")
        }
        truth = reference.inverted_residual(x.double(), weights.to(torch.float64), **settings)
        plain = reference.inverted_residual(x, weights, **settings)
        for backend in backends:
            on_device = weights.to(device)
            y = inverted_residual(x.to(device), on_device, backend=backend, **settings).cpu()
            yield result(block.name, x, backend, y, plain, truth)


def result(block: str, x: Tensor, backend: str, y: Tensor, plain: Tensor, truth: Tensor) -> Result:
    """What is to say of a result y for x, beside the one of plain PyTorch and that in float64."""
    return Result(
        block,
        tuple(x.shape),
        str(x.dtype).removeprefix("torch."),
        backend,
        _errors(y, truth)[0],
        _errors(plain, truth)[0],
        why_wrong(y, plain, truth),
    )


def why_wrong(y: Tensor, plain: Tensor, truth: Tensor) -> str | None:
    """None where y is about as near to the float64 truth as plain PyTorch in y's dtype is.

    The numerics policy: at most twice plain's largest error and 1.5 times its mean error, and a
    floor of a few roundings of the largest value for results where plain is exact by luck.
    """
    if y.shape != truth.shape:
        return f"shape {tuple(y.shape)}, expected {tuple(truth.shape)}"
    floor = 8 * torch.finfo(y.dtype).eps * truth.abs().max().item()
    plain_max, plain_mean = _errors(plain, truth)
    allowed_max, allowed_mean = 2 * plain_max + floor, 1.5 * plain_mean + floor / 4
    worst, mean = _errors(y, truth)
    # Written so that a NaN is wrong.
    if worst <= allowed_max and mean <= allowed_mean:
        return None
    return (
        f"largest error {worst:.2e} (allowed {allowed_max:.2e}),"
        f" mean error {mean:.2e} (allowed {allowed_mean:.2e})"
    )


def _errors(y: Tensor, truth: Tensor) -> tuple[float, float]:
    if y.shape != truth.shape:
        return inf, inf
    error = (y.double() - truth).abs()
    return error.max().item(), error.mean().item()


def example(
    block: BlockConfig,
    batch: int,
    height: int,
    width: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, FoldedWeights]:
    """x (batch, C_in, height, width) and weights that make both clips of both hidden tensors work.

    Biases are float32 whatever the dtype of the rest.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    c_in, hidden, kernel = block.in_channels, block.hidden_channels, block.kernel_size
    of_dw = (kernel, kernel, *((c_in,) if block.dense else ()), hidden)
    weights = FoldedWeights(
        w_expand=(randn(c_in, hidden) * 3 / c_in**0.5).to(dtype),
        b_expand=randn(hidden) + 1,
        w_dw=(randn(*of_dw) * 3 / (kernel * math.prod(of_dw[2:-1]) ** 0.5)).to(dtype),
        b_dw=randn(hidden) + 1,
        w_project=(randn(hidden, block.out_channels) / hidden**0.5).to(dtype),
        b_project=randn(block.out_channels),
        clip_expand=RELU6,
        clip_dw=RELU6,
        clip_project=NO_CLIP,
    )
    if not block.expansion:
        weights = replace(weights, w_expand=None, b_expand=None, clip_expand=NO_CLIP)
    return randn(batch, c_in, height, width).to(dtype), weights
