"""Calls of the backward op in which no sum rounds: small integers, and float64 as the truth.

Whatever the order of a sum, its result is then the same to the bit, also where values are at the
bounds of a clip.
"""

import zlib
from functools import partial

import torch
from cases import Case
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP
from mnv2_kernels.ops import reference

NAMES = ("x", "w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")


def make_call(case: Case) -> tuple[list[Tensor | None], tuple, Tensor]:
    """(x and six weights, settings, grad_y) of a case, in the order of the op."""
    config, generator = case.config, torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    c_in, hidden, c_out = config.in_channels, config.hidden_channels, config.out_channels
    draw = partial(_integers, generator)
    # A few weights to a sum, so that many values are between the clips.
    expand = draw((c_in, hidden), 1, 3 / c_in) if config.expansion else None
    biases = [
        draw((n,), 2) if has else None
        for n, has in zip((hidden, hidden, c_out), case.biases, strict=True)
    ]
    tensors = [
        draw((case.batch, c_in, case.height, case.width), 2),
        expand,
        None if expand is None else biases[0],
        draw((config.kernel_size, config.kernel_size, hidden), 1, 3 / config.kernel_size**2),
        biases[1],
        draw((hidden, c_out), 1, 3 / hidden),
        biases[2],
    ]
    clips = (case.clips[0] if config.expansion else NO_CLIP, *case.clips[1:])
    size = config.output_hw(case.height, case.width)
    grad_y = draw((case.batch, c_out, *size), 3)
    return tensors, (*case.settings.values(), *clips), grad_y


def _integers(
    generator: torch.Generator, shape: tuple[int, ...], largest: int, share: float = 1
) -> Tensor:
    """float32 integers from -largest to largest; all but a share of them are 0."""
    values = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    return values * (torch.rand(shape, generator=generator) < share)


def true_gradients(
    tensors: list[Tensor | None], settings: tuple, grad_y: Tensor
) -> list[Tensor | None]:
    """Of all that is there, by autograd through the reference in float64."""
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, *weights = leaves
    names = ("stride", "padding", "dilation", "residual")
    with torch.enable_grad():
        y = reference.inverted_residual(
            x, FoldedWeights(*weights, *settings[4:]), **dict(zip(names, settings, strict=False))
        )
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, present, grad_y.double()))
    return [None if t is None else next(grads) for t in leaves]


def found_gradients(
    tensors: list[Tensor | None],
    settings: tuple,
    grad_y: Tensor,
    needs_grad: list[bool] | None = None,
) -> list[Tensor | None]:
    """Of the same by the op; None where none was asked for."""
    needs_grad = needs_grad or [t is not None for t in tensors]
    op = torch.ops.mnv2.inverted_residual_backward
    grads = iter(op(grad_y, *tensors, *settings, needs_grad))
    return [next(grads) if needed else None for needed in needs_grad]


def wrong(found: list[Tensor | None], truth: list[Tensor | None]) -> list[str]:
    """Names of the gradients that differ in any bit."""
    return [
        name
        for name, a, b in zip(NAMES, found, truth, strict=True)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a.double(), b))
    ]
