"""Put the fused block into models that exist: fuse, unfuse, fold.

A recognised block is replaced by `FusedInvertedResidual`, which has the same children under the
same names, and an nn.Sequential with blocks among its children by `FusedSequential`, which has them
too; nothing else in the model changes.
"""

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

from ..block.fold import FoldedWeights, fold_layers
from ..modules.fused_module import FusedModule
from ..modules.stand_in import StandIn
from ..ops.backends import check_backend, warn_if_layers_run
from ..recognizers import Declined, block_of, check_module, evaluation_mode, read_unknown
from .find import find, fused_chain
from .model import make_parts, make_whole
from .sequential import FusedRun, join_all


def fuse(
    model: nn.Module,
    *,
    backend: str | None = None,
    verify: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """The model with every recognised inverted residual block running in one pass.

    Names, attributes, state_dict keys and the number of children do not change; each call uses
    the current parameters. In training mode batch norms use the statistics of the batch, as before
    (docs/training.md says which blocks train in one pass). `explain` says what was not recognised,
    and why. `torch.compile` calls the blocks one by one, also where the model runs as one call
    without it; a plan stays one call in what is compiled.

    Example:
        >>> model = mk.fuse(mk.mobilenet_v2().eval())
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1000])

    Args:
        model: any module, also a single block.
        backend: a name from `backends()` for every block; None takes the first that can run.
        verify: compare each block with its original on random inputs.
        inplace: replace the blocks of this very model instead of a copy's.

    Returns:
        The model, or its replacement where the model itself is a block.

    Raises:
        TypeError: model is not a module.
        ValueError: backend is not a name of a backend; with `verify`, a block differs from its
            original, and the sentence names it. The model is then as it was.

    Warns:
        UserWarning: no kernel runs here; once in a process.
    """
    check_module("fuse", model)
    check_backend("fuse", backend)
    if not inplace:
        model = copy.deepcopy(model)
    make_parts(model)
    replaced: dict[nn.Module, StandIn] = {}
    fused: dict[str, FusedModule] = {}
    runs: dict[nn.Module, list[FusedRun]] = defaultdict(list)
    with evaluation_mode(model):
        blocks = list(find(model))
    for found in blocks:
        if found.fused is not None:
            fused[found.name] = found.fused
        elif found.reading is not None:
            fused[found.name] = block = found.make()
            if found.span is None:
                replaced[found.module] = block
            else:
                runs[found.module].append(FusedRun(*found.span, block))
    replaced |= {chain: fused_chain(chain, inside) for chain, inside in runs.items()}
    if verify:
        for name, block in fused.items():
            _verify(name, block, backend or block.backend)
    if fused and backend is None:
        warn_if_layers_run(next(model.parameters()).device, may_move=True)
    if backend is not None:
        for block in fused.values():
            block.backend = backend
    model = join_all(_replace(model, replaced))
    make_whole(model)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with the original blocks in place of the fused ones, weights as they are now.

    `InvertedResidual` is its own original and stays. `inplace` and the result are as in `fuse`.

    Example:
        >>> model = mk.mobilenet_v2()
        >>> list(mk.unfuse(mk.fuse(model)).state_dict()) == list(model.state_dict())
        True

    Raises:
        TypeError: model is not a module.
    """
    check_module("unfuse", model)
    if not inplace:
        model = copy.deepcopy(model)
    make_parts(model)
    originals = {}
    for module in model.modules():
        if isinstance(module, StandIn):
            module.original.training = module.training
            originals[module] = module.original
    return _replace(model, originals)


def fold(block: nn.Module) -> FoldedWeights:
    """The weights of one block with batch norm folded in; they follow no later change.

    Example:
        >>> mk.fold(mk.InvertedResidual(16, 24, expand_ratio=6)).w_project.shape
        torch.Size([96, 24])

    Args:
        block: an `InvertedResidual`, a fused block, or any block that `fuse` would replace.

    Returns:
        Weights in the dtype of the block; biases in float32 where that has 16 bits.

    Raises:
        TypeError: block is not a module.
        ValueError: block is not such a block; the sentence says why.
    """
    check_module("fold", block, "block")
    kind = type(block).__name__
    try:
        with evaluation_mode(block):
            layers = block_of(read_unknown(block))
    except Declined as reason:
        raise ValueError(f"fold: {kind} cannot be folded: {reason}") from None
    if layers.lead is not None:
        raise ValueError(
            f"fold: {kind} cannot be folded: it begins with a depthwise of its own, of which"
            " FoldedWeights know nothing"
        )
    return fold_layers(layers)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Swap modules for others wherever they are children; a shared one stays shared."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


# Odd and even sizes: padding that depends on the size differs between them.
_VERIFIED_SIZES = ((13, 11), (10, 12), (9, 14))


def _verify(name: str, block: FusedModule, backend: str | None) -> None:
    """Raise ValueError where a block differs from its plain layers in evaluation mode.

    The arithmetic is compared in float64; the kernel in the block's own dtype, on its device.
    Works on copies, and draws from a generator of its own.
    """
    exact = copy.deepcopy(block).eval().to("cpu", torch.float64)
    exact.backend = "reference"
    own = copy.deepcopy(block).eval()
    own.backend = backend
    weight = own.block_layers.project.conv.weight
    generator = torch.Generator().manual_seed(0)
    for height, width in _VERIFIED_SIZES:
        size = (2, block.config.in_channels, height, width)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        x[1] *= 20  # Reaches the upper clips too.
        with torch.no_grad():
            truth = exact.plain_forward(x)
            _check_close(name, exact.forward(x), truth, 1e-8 * _largest(truth))
            x = x.to(weight)
            plain = own.plain_forward(x).to(truth)
            eps = torch.finfo(weight.dtype).eps
            allowed = 10 * _largest(plain - truth) + 100 * eps * _largest(truth)
            _check_close(name, own.forward(x).to(truth), truth, allowed)


def _check_close(name: str, fused: Tensor, plain: Tensor, allowed: float) -> None:
    if fused.shape != plain.shape:
        found = f"shape {tuple(fused.shape)} instead of {tuple(plain.shape)}"
    elif not torch.allclose(fused, plain, rtol=0, atol=allowed, equal_nan=True):
        found = f"largest difference {_largest(fused - plain):.3g} of {_largest(plain):.3g}"
    else:
        return
    raise ValueError(
        f"fuse: block {name!r} fused is not what its own forward computes ({found});"
        " it does something that its children do not show"
    )


def _largest(values: Tensor) -> float:
    return values.abs().nan_to_num().max().item()
