"""What "a fused model answers as its layers do" means, checked from the outside.

A result passes if it has the bits of the layers' own, or if its error against the layers in float64
is at most twice theirs, and a little for tensors that are exact by luck.
"""

import copy
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

FLOOR = 8


def randomise(module: nn.Module) -> nn.Module:
    """The module in evaluation mode; every batch norm with statistics and weights of its own."""
    for norm in module.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
            if norm.weight is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
    return module.eval()


@torch.no_grad()
def enliven(model: nn.Module, x: Tensor) -> nn.Module:
    """A whole network in evaluation mode whose values are neither clipped away nor all alike.

    Its batch norms get the statistics of what they see for x, and scales around which ReLU6 acts.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(1, 3)
        norm.bias.normal_(1, 1)
        norm.momentum = 1.0
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_(min=0.05)
    return model.eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers around zero, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(model: nn.Module, args: tuple, kwargs: dict, seed: int = 0):
    """(result, (the arguments afterwards, what was printed)) of a call on copies.

    Random numbers come from `seed`.
    """
    args, kwargs = tree_map(_cloned, (args, kwargs))
    torch.manual_seed(seed)
    with redirect_stdout(StringIO()) as printed:
        result = model(*args, **kwargs)
    return result, (args, kwargs, printed.getvalue())


def _cloned(value):
    return value.clone() if isinstance(value, Tensor) else value


def why_other(found, plain, truth=None) -> str | None:
    """None where every tensor of `found` may replace the one of `plain`, otherwise what differs.

    Without a truth the layers' own float32 results are it.
    """
    pairs = zip_longest(tree_leaves(found), tree_leaves(plain), tree_leaves(truth))
    for index, (y, z, exact) in enumerate(pairs):
        reason = _why_other_leaf(y, z, exact)
        if reason is not None:
            return f"result {index}: {reason}"
    return None


def _why_other_leaf(y, z, exact) -> str | None:
    if not isinstance(z, Tensor):
        return None if type(y) is type(z) and y == z else f"{y!r}, expected {z!r}"
    if not isinstance(y, Tensor) or y.shape != z.shape or y.dtype != z.dtype:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        return f"{shape}, expected {tuple(z.shape)} of {z.dtype}"
    if torch.equal(y, z) or y.numel() == 0:
        return None
    y, z = y.detach().double(), z.detach().double()
    if exact is None:
        worst, allowed = _largest(y - z), 1e-4 * _largest(z)
    else:
        exact = exact.detach().double()
        worst = _largest(y - exact)
        eps = torch.finfo(torch.float32).eps
        allowed = 2 * _largest(z - exact) + FLOOR * eps * _largest(exact)
    return None if worst <= allowed else f"largest error {worst:.3g}, allowed {allowed:.3g}"


def _largest(t: Tensor) -> float:
    return t.abs().max().item()


def in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def doubled(arguments):
    """The arguments with every floating-point tensor in float64."""
    return tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, arguments
    )


def gradients(model: nn.Module, arguments: Callable, x: Tensor, seed: int = 0):
    """(result, gradient of x, gradients of the parameters by name); None where there is none.

    The loss weighs every element of the result differently.
    """
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    args, kwargs = arguments(leaf * 1)  # Nobody may write into a leaf.
    torch.manual_seed(seed)
    result = model(*args, **kwargs)
    losses = [
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        for y in tree_leaves(result)
        if isinstance(y, Tensor) and y.requires_grad
    ]
    if losses:
        sum(losses).backward()
    return result, leaf.grad, {name: p.grad for name, p in model.named_parameters()}


def unambiguous_input(model: nn.Module, arguments: Callable, shape: tuple[int, ...]) -> Tensor:
    """An image near which no activation changes its branch, as far as float64 can say.

    Where a value is within rounding of a clip, the gradients of two right computations differ.
    """
    for seed in range(40):
        x = image(*shape, seed=seed).double()
        _, first, _ = gradients(in_double(model), arguments, x)
        if first is None:
            return x.float()
        near = (x + 1e-5 * image(*shape, seed=100 + i).double() for i in range(2))
        others = [gradients(in_double(model), arguments, n)[1] for n in near]
        if all(_largest(other - first) <= 2e-4 * _largest(first) for other in others):
            return x.float()
    raise AssertionError("every image lies on an edge")


def why_other_gradient(found: Tensor | None, plain: Tensor | None, truth=None) -> str | None:
    """The same of a gradient: within 1e-4 of the layers' own, or by the rule for results."""
    if found is None or plain is None:
        none = "one has no gradient, the other has"
        return none if (found is None) != (plain is None) else None
    if found.shape == plain.shape and _largest(found - plain) <= 1e-4 * _largest(plain):
        return None
    return why_other(found, plain, truth)


def ran_fused(model: nn.Module, *args) -> tuple[bool, bool]:
    """(an op of this package was called, a convolution of PyTorch was called) by model(*args)."""
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        model(*args)
    called = {event.key for event in profile.key_averages()}
    return any(key.startswith("mnv2::") for key in called), "aten::conv2d" in called
