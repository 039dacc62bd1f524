"""What PyTorch is told alike about both ops of a block: shapes, gradients, autocast, FLOPs, vmap.

The first arguments of an op are tensors: x, and then a weight and its bias by turns, of which some
may be None. After them come stride, padding, dilation and residual, then what follows the layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


class Op(NamedTuple):
    """An op, how many tensors it takes, the schema of its other arguments, its contract, and the
    function that gives its gradients.

    `check` of all arguments gives the shape of the result, `gradients` of grad_y, all arguments and
    needs_grad what `mnv2::{name}_backward` gives.
    """

    name: str
    tensors: int
    settings: str
    check: Callable[..., tuple[int, int, int, int]]
    gradients: Callable[..., list[Tensor]]


def register(library: torch.library.Library, op: Op) -> None:
    """All of it, for an op and its backward, which `library` defines."""
    name = f"{op.name}_backward"
    register_forward(library, op, op.name)
    library.impl(name, op.gradients, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mnv2::{name}", partial(_backward_fake, op), lib=library)
    torch.library.register_autograd(f"mnv2::{name}", partial(_double_backward, op), lib=library)
    register_flop_formula(getattr(torch.ops.mnv2, name))(partial(_backward_flops, op))


def register_forward(library: torch.library.Library, op: Op, name: str) -> None:
    """The same for the op, or for a twin of it with another name and the same backward."""
    full = f"mnv2::{name}"
    register_fake(library, op, name)
    torch.library.register_autograd(
        full, partial(_backward, op), setup_context=partial(_setup_context, op), lib=library
    )
    torch.library.register_vmap(full, partial(_no_vmap, op), lib=library)
    for device, key in AUTOCAST_KEYS.items():
        library.impl(name, _autocast(op, name, device, getattr(torch._C.DispatchKey, key)), key)
    register_flop_formula(getattr(torch.ops.mnv2, name))(partial(_flops, op))


def register_fake(library: torch.library.Library, op: Op, name: str) -> None:
    """The shape of the result alone."""
    torch.library.register_fake(f"mnv2::{name}", partial(_fake, op), lib=library)


def _fake(op: Op, x, *args):
    shape = op.check(x, *args)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _backward_fake(op: Op, grad_y, *args):
    tensors, needs_grad = args[: op.tensors], args[-1]
    wanted = (t for t, needed in zip(tensors, needs_grad, strict=True) if needed)
    grads = [t.new_empty(t.shape) for t in wanted]
    if needs_grad[0]:
        grads[0] = grads[0].to(memory_format=torch.channels_last)
    return grads


def _setup_context(op: Op, ctx, inputs, output):
    ctx.save_for_backward(*inputs[: op.tensors])
    ctx.settings = inputs[op.tensors :]


def _backward(op: Op, ctx, grad_y):
    needs_grad = ctx.needs_input_grad[: op.tensors]
    backward = getattr(torch.ops.mnv2, f"{op.name}_backward")
    grads = iter(backward(grad_y, *ctx.saved_tensors, *ctx.settings, needs_grad))
    found = (next(grads) if needed else None for needed in needs_grad)
    return *found, *(None,) * len(ctx.settings)


def _double_backward(op: Op, ctx, *grads):
    raise NotImplementedError(
        f"{op.name}: second derivatives are not implemented;"
        " backend='reference' is differentiable any number of times"
    )


def _no_vmap(op: Op, info, in_dims, *args):
    raise NotImplementedError(
        f"{op.name}: vmap is not supported, the op takes batches itself: x (N, C_in, H, W)"
    )


def cast_for_autocast(
    op: Op, device: str, arguments: tuple[Any, ...], dtype: torch.dtype
) -> tuple[list[Any], bool]:
    """The op's arguments in the dtype of autocast, with biases in float32 as `fold` has them.

    What the layers of a block add to a float32 x is float32: if so, the result of these arguments
    is without the residual, and x is still to be added.
    """

    def cast(argument, dtype: torch.dtype):
        is_cast = isinstance(argument, Tensor) and argument.device.type == device
        return argument.to(dtype) if is_cast and argument.dtype in _AUTOCAST_FROM else argument

    biases = range(2, op.tensors, 2)
    found = [cast(a, torch.float32 if i in biases else dtype) for i, a in enumerate(arguments)]
    kept = torch.promote_types(arguments[0].dtype, found[0].dtype) == found[0].dtype
    residual = op.tensors + 3
    adds = arguments[residual] and not kept
    if adds:
        op.check(*found)
        found[residual] = False
    return found, adds


def _autocast(op: Op, name: str, device: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    """As `torch.library.register_autocast`, but in the dtype that the user has chosen."""
    keys = torch._C.DispatchKeySet(key)
    overload = getattr(torch.ops.mnv2, name).default

    def cast_and_call(*arguments):
        dtype = torch.get_autocast_dtype(device)
        cast, adds = cast_for_autocast(op, device, arguments, dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*cast) + arguments[0] if adds else overload(*cast)

    return cast_and_call


def _flops(op: Op, *args, out_shape, **kwargs) -> int:
    """Two per multiply-add, as torch's own formulas; halo recomputation is not counted."""
    return 2 * sum(multiply_adds(args[: op.tensors], out_shape))


def _backward_flops(op: Op, grad_shape, *args, **kwargs) -> int:
    """The products that give the gradients asked for; recomputing the block is not counted."""
    tensors = args[: op.tensors]
    expansion, depthwise, projection, squeeze, excite = multiply_adds(tensors, grad_shape)
    needs_grad = (*args[-1], *(False,) * 4)[:11]
    x, w_expand, b_expand, w_dw, b_dw, w_project, _, *of_gate = needs_grad
    w_squeeze, b_squeeze, w_excite, b_excite = of_gate
    through_expansion = x or w_expand or b_expand
    through_depthwise = through_expansion or w_dw or b_dw
    through_squeeze = through_depthwise or w_squeeze or b_squeeze
    through_gate = through_squeeze or w_excite or b_excite
    return 2 * (
        expansion * (w_expand + x)
        + depthwise * (w_dw + through_expansion)
        + projection * (w_project + through_gate)
        + squeeze * (w_squeeze + through_depthwise)
        + excite * (w_excite + through_squeeze)
    )


def multiply_adds(shapes: Sequence[Any], y_shape: Sequence[int]) -> tuple[int, int, int, int, int]:
    """Of expansion, depthwise, projection, squeeze and excite; `shapes` are those of the tensors
    that an op takes.
    """
    (batch, in_channels, height, width), w_expand, _, w_dw = shapes[:4]
    out_pixels, hidden = batch * math.prod(y_shape[2:]), w_dw[-1]
    expansion = 0 if w_expand is None else batch * height * width * in_channels * hidden
    depthwise, projection = out_pixels * math.prod(w_dw), out_pixels * hidden * y_shape[1]
    gate = batch * math.prod(shapes[7]) if len(shapes) > 7 and shapes[7] is not None else 0
    return expansion, depthwise, projection, gate, gate
