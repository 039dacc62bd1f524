"""What a forward computes, as layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.random import fork_rng

from .assemble import layers_of
from .checks import (
    check_untouched,
    has_hooks,
    left_as_it_was,
    only_computing,
    uncounted,
    unrecorded,
)
from .declined import Declined, describe
from .layers import Layer, Reading
from .operations import ChannelsDiffer
from .trace import Trace


def read(
    module: nn.Module,
    shape: Sequence[int],
    calls: Sequence[Callable[[Tensor], Tensor]] | None = None,
    live_norms: bool = False,
) -> Reading:
    """What the forward of a module computes for x of `shape` (N, C, H, W), in the modes it has now.

    Args:
        module: whose parameters and buffers are used.
        calls: functions that run one after the other in place of the forward.
        live_norms: batch norms in training mode are read like others; without it they are
            declined.

    Raises:
        Declined: the forward is something else than a chain of layers; the sentence says what.
    """
    calls = [module.forward] if calls is None else calls
    trace, error = follow(module, shape, calls, live_norms)
    if error is not None:
        raise error
    return Reading(tuple(layers_of(trace, len(calls))), trace.is_sized)


def follow(
    module: nn.Module,
    shape: Sequence[int],
    calls: Sequence[Callable[[Tensor], Tensor]],
    live_norms: bool = False,
) -> tuple[Trace, Declined | None]:
    """What the calls do, up to one that is declined; `trace.outputs` has the results so far."""
    like = next((p for p in module.parameters() if not is_lazy(p) and p.is_floating_point()), None)
    if like is None:
        raise Declined("it has no parameters that are real numbers")
    trace = Trace(module, live_norms)
    error = None
    try:
        # A forward may draw random numbers before it is declined.
        with fork_rng([]), unrecorded(), torch.inference_mode(False), torch.enable_grad():
            x = first = trace.begin(shape, like)
            for trace.call, call in enumerate(calls):
                called = call if isinstance(call, nn.Module) else module
                before = len(trace.made)
                try:
                    _check_call(called, is_forward=called is not call)
                    with uncounted(called), left_as_it_was(called), only_computing():
                        x = call(x)
                    if trace.reason is not None:
                        raise trace.reason
                    _check_result(trace, x, first)
                except Exception:
                    del trace.made[before:]
                    raise
                trace.outputs.append(x.node)
    except Declined as reason:
        error = reason
    except Exception as problem:
        error = Declined(f"its forward cannot be followed: {problem}")
    return trace, error


def _check_call(called: nn.Module, is_forward: bool) -> None:
    """Decline what may not be called, or would be missed if it was not.

    Where the forward alone is read, the hooks of the module itself are called all the same.
    """
    if not is_forward and has_hooks(called):
        raise Declined(f"{describe(called)} has hooks, which would not be called")
    check_untouched(called)


def _check_result(trace: Trace, y: object, first: Tensor) -> None:
    if not isinstance(y, Tensor) or type(y) is not type(first):
        raise Declined(f"its result is a {type(y).__name__} that was not computed from its input")
    with torch._C.DisableTorchFunctionSubclass():
        if y.grad_fn is not None:
            raise Declined("its forward calls an autograd function of its own")
    if first.node.kind != "input":
        raise Declined("its forward changes its input in place")


def runs_in_order(
    module: nn.Module,
    children: Sequence[nn.Module],
    shape: Sequence[int],
    live_norms: bool = False,
) -> tuple[bool, bool]:
    """Whether the forward of a module runs children one after the other for x of `shape`, and
    whether that says so for all shapes. `live_norms` as in `read`.
    """
    try:
        whole = read(module, shape, live_norms=live_norms)
        parts = read(module, shape, children, live_norms)
    except Declined:
        return False, False
    is_sized = whole.is_sized or parts.is_sized
    return same_layers(whole.layers, parts.layers), not is_sized


def same_layers(first: Sequence[Layer], second: Sequence[Layer]) -> bool:
    """Whether two readings are of the same modules with the same arguments."""
    return len(first) == len(second) and all(
        vars(a) == vars(b) and type(a) is type(b) for a, b in zip(first, second, strict=True)
    )


# What a module is read for where nothing says what it will be called with.
_USUAL_SIZE = (224, 224)


def read_unknown(
    module: nn.Module,
    calls: Sequence[Callable[[Tensor], Tensor]] | None = None,
    live_norms: bool = False,
) -> Reading:
    """`read` for images of a usual size, with as many channels as the first convolution takes.

    Raises:
        Declined: as `read`.
    """
    try:
        return read(module, (1, guess_channels([module]), *_USUAL_SIZE), calls, live_norms)
    except ChannelsDiffer as reason:
        try:
            return read(module, (1, reason.expected, *_USUAL_SIZE), calls, live_norms)
        except ChannelsDiffer:
            raise reason from None


def guess_channels(modules: Sequence[nn.Module]) -> int:
    """How many channels the first convolution takes, if it is the first that runs."""
    weights = (p for module in modules for p in module.parameters() if is_image_weight(p))
    weight = next(weights, None)
    if weight is None:
        return 3
    return weight.shape[0] if weight.shape[1] == 1 else weight.shape[1]


def has_depthwise(module: nn.Module) -> bool:
    """Whether a depthwise convolution's weight is inside."""
    return any(map(is_depthwise_weight, module.parameters()))


def may_have_block(module: nn.Module) -> bool:
    """Whether the weight of a depthwise convolution is inside, or of one that expands before a 1x1
    that narrows.
    """
    weights = [p for p in module.parameters() if is_image_weight(p)]
    narrows = (
        first.shape[0] == second.shape[1] > max(first.shape[1], second.shape[0])
        and second.shape[2:] == (1, 1)
        for first, second in pairwise(weights)
    )
    return any(narrows) or any(map(is_depthwise_weight, weights))


def is_image_weight(weight: Tensor) -> bool:
    """Whether a parameter may be the weight of a convolution of images."""
    return not is_lazy(weight) and weight.dim() == 4


def is_depthwise_weight(weight: Tensor) -> bool:
    """(C, 1, k, k) with k > 1 and C > 1."""
    if not is_image_weight(weight):
        return False
    return weight.shape[1] == 1 < weight.shape[0] and max(weight.shape[2:]) > 1
