"""Sums, products and quotients: of results, of a result and a number, and of frozen batch norms."""

from functools import partial

import torch
from torch import Tensor, nn

from .activations import Number, of_number, product, put
from .gates import gated
from .trace import Node, Norm, Recorded, Trace, is_known


def _add(trace, x, other, *, alpha=1, out=None, in_place=False) -> Recorded:
    if isinstance(x, Recorded) and alpha == 1 and out is None:
        if x.node.kind == "scaled" and is_known(other):
            return _shifted(trace, x, other, in_place)
        if isinstance(other, Number):
            result = of_number(trace, x, lambda formula: formula.shifted(other), in_place)
            if result is not None:
                return result
    both = isinstance(x, Recorded) and isinstance(other, Recorded)
    if not both or alpha != 1 or out is not None or x.sizes != other.sizes:
        raise trace.declined("it adds something else than two results of one shape")
    return put(trace, x, Node("add", (x.node, other.node), trace.call), in_place)


def _multiply(trace, x, other, *, out=None, in_place=False) -> Recorded:
    if out is not None:
        raise trace.declined("it gives the result of a product to a tensor")
    if isinstance(x, Recorded) and isinstance(other, Recorded):
        node = product(trace, x, other)
        return gated(trace, x, other, in_place) if node is None else put(trace, x, node, in_place)
    if isinstance(other, Number):
        return _scaled_by(trace, x, other, in_place)
    if in_place:
        raise trace.declined("it multiplies by something")
    return _scaled(trace, x, other)


def _divide(trace, x, other, *, rounding_mode=None, out=None, in_place=False) -> Recorded:
    usual = isinstance(x, Recorded) and isinstance(other, Number) and other != 0
    if not usual or rounding_mode is not None or out is not None:
        raise trace.declined("it divides by something else than a number")
    return _scaled_by(trace, x, 1 / other, in_place)


def _scaled_by(trace: Trace, x: Recorded, number: Number, in_place: bool) -> Recorded:
    result = of_number(trace, x, lambda formula: formula.scaled(number), in_place)
    if result is None:
        raise trace.declined(f"it multiplies by {number:g}")
    return result


def _scaled(trace: Trace, x: Tensor, other: Tensor) -> Recorded:
    """The first half of a frozen batch norm: x * (weight / sqrt(running_var + eps))."""
    x, scale = (x, other) if isinstance(x, Recorded) else (other, x)
    norm = trace.running()
    if not (is_known(scale) and _is_frozen(norm)):
        raise trace.declined("it multiplies by something")
    if not torch.equal(scale.flatten(), norm.weight * (norm.running_var + norm.eps).rsqrt()):
        raise trace.declined("it multiplies by something else than a frozen batch norm does")
    return trace.new(Norm("scaled", (x.node,), trace.call, norm), x.sizes)


def _shifted(trace: Trace, x: Recorded, shift: Tensor, in_place: bool) -> Recorded:
    """The second half: + (bias - running_mean * scale)."""
    norm = x.node.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    if not torch.equal(shift.flatten(), norm.bias - norm.running_mean * scale):
        raise trace.declined("it adds something else than a frozen batch norm does")
    return put(trace, x, Norm("norm", x.node.inputs, trace.call, norm), in_place)


def _is_frozen(module: nn.Module | None) -> bool:
    tensors = ("weight", "bias", "running_mean", "running_var")
    return isinstance(getattr(module, "eps", None), float) and all(
        isinstance(module._buffers.get(name), Tensor) for name in tensors
    )


_PRODUCTS = (
    *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply),
    *(Tensor.__mul__, Tensor.__rmul__),
)
_QUOTIENTS = (
    *(torch.div, torch.divide, torch.true_divide),
    *(Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__),
)
TABLE = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), partial(_add, in_place=True)),
    **dict.fromkeys(_PRODUCTS, _multiply),
    **dict.fromkeys(
        (Tensor.mul_, Tensor.multiply_, Tensor.__imul__), partial(_multiply, in_place=True)
    ),
    **dict.fromkeys(_QUOTIENTS, _divide),
    **dict.fromkeys(
        (Tensor.div_, Tensor.divide_, Tensor.__itruediv__), partial(_divide, in_place=True)
    ),
}
