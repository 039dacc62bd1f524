"""Programs of plans: changed numbers, marked memory, and what a program says, layer by layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mnv2_kernels.block.config import CURVES
from mnv2_kernels.ops.reference import activate

MARK = 0xA5


def between_marks(nbytes: int) -> tuple[Tensor, Tensor]:
    """(bytes with marks around, the arena of `nbytes` in it, which is marked too)."""
    buffer = torch.full((nbytes + 256,), MARK, dtype=torch.uint8)
    begin = 64 + -buffer.data_ptr() % 64
    return buffer, buffer[begin : begin + nbytes]


def one_by_one(x: Tensor, weights: list[Tensor], integers: list[int], bounds: list[float]):
    """What a program says, in float64, layer by layer: no matter where in memory and in what order.

    Written against the format in csrc/torch/program.cpp and not with what wrote the program.
    """
    number, weight, bound = iter(integers), iter(weights), iter(bounds)

    def take(count: int) -> list[int]:
        return [next(number) for _ in range(count)]

    def tensor(*shape: int) -> Tensor | None:
        found = next(weight)
        return None if found is None else found.double().view(shape)

    def activated(y: Tensor) -> Tensor:
        (curve,), clip = take(1), (next(bound), next(bound))
        return y.clamp(*clip) if curve == 0 else activate(y, CURVES[curve - 1])

    def gate(d: Tensor) -> Tensor:
        width, hard = take(2)
        hidden = d.shape[1]
        w_squeeze, b_squeeze = tensor(hidden, width), tensor(width)
        w_excite, b_excite = tensor(width, hidden), tensor(hidden)
        z = activated(d.mean((2, 3)) @ w_squeeze + b_squeeze) @ w_excite + b_excite
        return (F.hardsigmoid(z) if hard else z.sigmoid())[:, :, None, None]

    def pad(y: Tensor, top: int, left: int, rows: int, cols: int) -> Tensor:
        return F.pad(y, (left, cols - left - y.shape[3], top, rows - top - y.shape[2]))

    take(3)
    take(take(1)[0])
    _, count = take(2)
    x = x.double()
    for _ in range(count):
        kind, _, _, _ = take(4)
        if kind == 0:
            _, _, rows, cols, c_in, c_out, top, left = take(8)
            taps = tensor(3, 3, c_in, c_out).permute(3, 2, 1, 0)
            x = pad(x, top, left, 2 * rows + 1, 2 * cols + 1)
            x = activated(F.conv2d(x, taps, tensor(c_out), 2))
        elif kind == 1:
            _, _, rows, cols, c_in, hidden, c_out, k, stride, dilation, top, left = take(12)
            residual, expansion, dense = take(3)
            y = x
            if expansion:
                w_expand = tensor(c_in, hidden).t()[:, :, None, None]
                y = F.conv2d(y, w_expand, tensor(hidden))
            # Nothing follows an expansion that is not there.
            expanded = activated(y)
            y = expanded if expansion else y
            reach = dilation * (k - 1) + 1
            y = pad(y, top, left, (rows - 1) * stride + reach, (cols - 1) * stride + reach)
            if dense:
                w_dw, groups = tensor(k, k, c_in, hidden).permute(3, 2, 0, 1), 1
            else:
                w_dw, groups = tensor(k, k, hidden).permute(2, 0, 1)[:, None], hidden
            y = activated(F.conv2d(y, w_dw, tensor(hidden), stride, 0, dilation, groups))
            w_project = tensor(hidden, c_out).t()[:, :, None, None]
            b_project = tensor(c_out)
            (after,), clip = take(1), (next(bound), next(bound))
            (gated,) = take(1)
            y = F.conv2d(y * gate(y) if gated else y, w_project, b_project)
            y = y.clamp(*clip) if after == 0 else activate(y, CURVES[after - 1])
            x = x + y if residual else y
        elif kind == 2:
            _, _, c_in, c_out, convolves = take(5)
            if convolves:
                x = F.conv2d(x, tensor(c_in, c_out).t()[:, :, None, None], tensor(c_out))
            # Nothing follows a convolution that is not there.
            after = activated(x)
            x = (after if convolves else x).mean((2, 3))
        elif kind == 4:
            _, _, c_in, c_out = take(4)
            x = activated(F.conv2d(x, tensor(c_in, c_out).t()[:, :, None, None], tensor(c_out)))
        else:
            features, classes = take(2)
            x = activated(F.linear(x.flatten(1), tensor(classes, features), tensor(classes)))
    return x


HOSTILE = (-1, 0, 1, 2, 3, 5, 16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 16, 2**63 - 1, -(2**63))


PROGRAMS = [
    ("short", (2, 3, 48, 40)),
    ("features-3", (2, 3, 24, 20)),
    ("features-8", (2, 3, 24, 20)),
    ("residuals", (2, 3, 24, 20)),
    ("mean-alone", (2, 3, 24, 20)),
    ("pointwise", (2, 3, 24, 20)),
    ("block-residual", (2, 3, 9, 8)),
]
