"""A fused block where a forward pass is recorded, transformed or done with stand-ins of tensors."""

import torch
from torch import fx, nn
from torch.autograd import forward_ad, profiler
from torch.nn.modules import module as hooks_of_all
from torch.utils._device import DeviceContext

from ..ops import extension


def is_plain_call(x: object) -> bool:
    """Whether x is a tensor that kernels for CPUs take, and nobody looks at single layers.

    While a profiler records, layers run one by one, each in a range of its own.
    """
    return (
        extension.module is not None
        # A default device, which is such a mode, changes nothing here.
        and extension.module.is_plain_call(x, DeviceContext)
        and not profiler._is_profiler_enabled
        and forward_ad._current_level < 0
        and not has_global_hooks()
    )


def is_observed() -> bool:
    """Whether more than values may be wanted of the tensors: a recording or a derivative.

    That is so under `torch.jit.trace`, a dispatch mode (make_fx, fake tensors, counting FLOPs) and
    forward-mode differentiation; cached weights would be constants to them.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def has_global_hooks() -> bool:
    """Whether the process has hooks that are called for every module."""
    return bool(
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    )


def trace_symbolically(block: nn.Module, x, args: tuple, kwargs: dict):
    """The block of something that is no tensor: a node of its own where `torch.fx` traces.

    The plain layers are traced where the block is all that is traced, since a graph cannot call
    itself, and for quantisation, which would leave the block in floating point. What is no proxy
    goes to the plain layers too: what they make of it is the original's business.
    """
    if isinstance(x, fx.Proxy) and not _quantises(x.tracer):
        if block is x.tracer.root:
            return block.plain_forward(x)
        path = x.tracer.path_of_module(block)
        return x.tracer.create_proxy("call_module", path, (x, *args), kwargs)
    return block.plain_forward(x, *args, **kwargs)


def _quantises(tracer: fx.Tracer) -> bool:
    # By name: the class comes with torch or torchao, and importing either costs a second.
    return any(c.__name__ == "QuantizationTracer" for c in type(tracer).__mro__)
