"""Activations: functions of every number for itself, as one function or put together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from .formulas import HARDSIGMOID, HARDSWISH, Formula
from .trace import Clamp, Curve, Node, Recorded, Scale, Trace, Unfinished

Number = int | float


@dataclass(frozen=True, eq=False)
class Computed(Unfinished):
    """What a formula makes of a value, and no activation so far."""

    formula: Formula = Formula()


def formula_of(node: Node) -> tuple[Node, Formula]:
    """Of which value `node` is computed by a formula, which may be that of x itself."""
    match node:
        case Computed():
            return node.inputs[0], node.formula
        case Scale(scale="hardsigmoid"):
            return node.inputs[0], HARDSIGMOID
    return node, Formula()


def put(trace: Trace, x: Recorded, node: Node, in_place: bool) -> Recorded:
    """The result of an operation that keeps shapes."""
    return trace.replace(x, node) if in_place else trace.new(node, x.sizes)


def computed(trace: Trace, base: Node, formula: Formula, parts: tuple[Node, ...]) -> Node:
    """What a formula makes of `base`, by its usual name if it has one; `parts` were on the way."""
    usual, parts = ((base,), trace.call), tuple(part for part in parts if part is not base)
    if formula == HARDSWISH:
        return Curve("hardswish", *usual, "hardswish", parts=parts)
    if formula == HARDSIGMOID:
        return _scale(trace, base, "hardsigmoid", parts)
    if formula == Formula(lower=formula.lower, upper=formula.upper):
        return Clamp("clip", *usual, (formula.lower, formula.upper), parts=parts)
    reason = trace.declined(f"it computes {formula}, which is no activation that is supported")
    return Computed("formula", *usual, reason, formula, parts=parts)


def _scale(trace: Trace, base: Node, name: str, parts: tuple[Node, ...] = ()) -> Scale:
    curve = {"sigmoid": "SiLU", "hardsigmoid": "hard swish"}[name]
    reason = trace.declined(f"a {name} must be a part of a gate or of {curve}, got it alone")
    return Scale(name, (base,), trace.call, reason, name, parts=parts)


def of_number(
    trace: Trace, x: Recorded, change: Callable[[Formula], Formula | None], in_place: bool
) -> Recorded | None:
    """`change` of what x is computed by, or else of x itself; None where neither is a formula."""
    base, formula = formula_of(x.node)
    result = change(formula)
    if result is None:
        base, result = x.node, change(Formula())
    if result is None:
        return None
    return put(trace, x, computed(trace, base, result, (x.node,)), in_place)


def product(trace: Trace, x: Recorded, other: Recorded) -> Node | None:
    """The activation, or a part of one, that the product of two values is; None for another one."""
    if x.sizes != other.sizes:
        return None
    for value, by in ((x.node, other.node), (other.node, x.node)):
        if isinstance(by, Scale) and by.scale == "sigmoid" and by.inputs == (value,):
            return Curve("silu", (value,), trace.call, "silu", parts=(by,))
    (base, first), (other_base, second) = map(formula_of, (x.node, other.node))
    formula = first.times(second) if base is other_base else None
    if formula is None:
        return None
    return computed(trace, base, formula, (x.node, other.node))


def _clamp(trace: Trace, x: Recorded, lower, upper, in_place: bool) -> Recorded:
    if not isinstance(x, Recorded):
        raise trace.declined("a bound of a clip is computed")
    bounds = (-inf if lower is None else lower, inf if upper is None else upper)
    if not all(isinstance(bound, Number) for bound in bounds):
        raise trace.declined("a bound of a clip is a tensor")
    if not bounds[0] <= bounds[1]:
        raise trace.declined(f"a clip has bounds in the wrong order, {bounds}")
    low, high = map(float, bounds)
    return of_number(trace, x, lambda formula: formula.clipped(low, high), in_place)


def _clip(trace, x, min=None, max=None, in_place=False) -> Recorded:
    return _clamp(trace, x, min, max, in_place)


def _at_least(trace, x, min) -> Recorded:
    return _clamp(trace, x, min, None, False)


def _at_most(trace, x, max) -> Recorded:
    return _clamp(trace, x, None, max, False)


def _relu(trace, x, inplace=False) -> Recorded:
    return _clamp(trace, x, 0, None, inplace)


def _relu6(trace, x, inplace=False) -> Recorded:
    return _clamp(trace, x, 0, 6, inplace)


def _hardtanh(trace, x, min_val=-1.0, max_val=1.0, inplace=False) -> Recorded:
    return _clamp(trace, x, min_val, max_val, inplace)


def _curve(name: str) -> Callable:
    def curve(trace, x, inplace=False) -> Recorded:
        return put(trace, x, Curve(name, (x.node,), trace.call, name), inplace)

    return curve


def _gelu(trace, x, *, approximate="none") -> Recorded:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in names:
        raise trace.declined(f"there is no gelu that is approximated by {approximate}")
    return _curve(names[approximate])(trace, x)


def _sigmoid(trace, x, in_place=False) -> Recorded:
    return put(trace, x, _scale(trace, x.node, "sigmoid"), in_place)


def _hardsigmoid(trace, x, inplace=False) -> Recorded:
    return put(trace, x, _scale(trace, x.node, "hardsigmoid"), inplace)


TABLE = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((F.relu_, torch.relu_, Tensor.relu_), partial(_relu, inplace=True)),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: partial(_hardtanh, inplace=True),
    **dict.fromkeys((torch.clamp, torch.clip, Tensor.clamp, Tensor.clip), _clip),
    **dict.fromkeys(
        (torch.clamp_, torch.clip_, Tensor.clamp_, Tensor.clip_), partial(_clip, in_place=True)
    ),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min), _at_least),
    **dict.fromkeys((torch.clamp_max, Tensor.clamp_max), _at_most),
    F.silu: _curve("silu"),
    F.hardswish: _curve("hardswish"),
    F.gelu: _gelu,
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, torch.special.expit), _sigmoid),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), partial(_sigmoid, in_place=True)),
    F.hardsigmoid: _hardsigmoid,
}
