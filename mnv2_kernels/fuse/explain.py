"""`explain`: which blocks of a model run fused, which could, and why the others do not."""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..block.cost import tensor_bytes
from ..modules.fused_module import FusedModule
from ..network.lower import chain_of, check_steps, image_shape
from ..network.plan import why_not_on_cpu
from ..ops.backends import BACKENDS, Block, cuda_kernel
from ..ops.extension import missing
from ..recognizers import (
    Declined,
    check_module,
    evaluation_mode,
    is_depthwise_weight,
    read_unknown,
)
from .find import Found, find
from .model import is_whole
from .report import Report, Row, State
from .sequential import FusedChain


def explain(model: nn.Module, *, input_shape: Sequence[int] | None = None) -> Report:
    """What `fuse` did or would do, block by block; prints as a table.

    The report is a tuple of one `Row` a block.

    Example:
        >>> report = mk.explain(mk.fuse(mk.mobilenet_v2()))
        >>> len(report), report[0].name
        (17, 'features.1')

    Args:
        model: any module, fused or not. It is left as it is.
        input_shape: (C, H, W) of an image, or (N, C, H, W). With it the report has sizes and bytes
            of one image too, from a run on the meta device, which computes shapes only.

    Raises:
        TypeError: model is not a module, or input_shape no sequence of integers.
        ValueError: input_shape is no shape of an image, or none that the model takes.
    """
    check_module("explain", model)
    shape = None if input_shape is None else image_shape("explain", input_shape)
    sizes = {} if shape is None else _input_sizes(model, shape)
    with evaluation_mode(model):
        blocks = list(find(model))
    report = Report(_rows(blocks, sizes))
    report.outside = tuple(_outside(model, blocks))
    report.why_no_plan = _why_no_chain(model, shape)
    report.runs_as_one = _runs_as_one(model)
    return report


def _why_no_chain(model: nn.Module, shape: tuple[int, int, int] | None) -> str | None:
    """Why `plan` would refuse the model."""
    first = next(model.parameters(), None)
    if first is not None and first.device.type == "cpu":
        reason = why_not_on_cpu(first.dtype)
        if reason is not None:
            return reason
    try:
        chain_of(model, shape)
    except Declined as reason:
        return str(reason)
    return None


def _runs_as_one(model: nn.Module) -> bool:
    """Whether the forward runs as one call; hooks of the model itself are called around it."""
    if missing is not None or not any(map(is_whole, model.modules())):
        return False
    try:
        with evaluation_mode(model):
            check_steps(read_unknown(model).layers)
    except Declined:
        return False
    return True


def _outside(model: nn.Module, blocks: list[Found]) -> Iterator[str]:
    """The depthwise convolutions that are in no block of the report."""
    inside: set[nn.Module] = set()
    for found in blocks:
        parts = [found.module]
        if found.span is not None:
            parts = list(found.module.children())[slice(*found.span)]
        inside.update(module for part in parts for module in part.modules())
    for name, module in model.named_modules():
        own = (p for p in module._parameters.values() if p is not None)
        if module not in inside and any(map(is_depthwise_weight, own)):
            yield name


def _rows(blocks: list[Found], sizes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    for found in blocks:
        if found.fused is not None:
            yield _row(found.name, "fused", found.fused, sizes.get(found.first))
        elif found.reading is not None:
            yield _row(found.name, "fusable", found.make(), sizes.get(found.first))
        else:
            yield Row(found.name, "declined", reason=found.reason)


def _row(name: str, state: State, block: FusedModule, size: tuple[int, int] | None) -> Row:
    weight = block.block_layers.project.conv.weight
    # Device and dtype of the input are those of the weight.
    x, chosen_by, saved = weight, None, None
    config = block.config
    if size is not None:
        x = weight.new_empty(()).expand(1, config.in_channels, *size)
        layers = block.call_for(x).layers
        layers = block.block_layers if layers is None else layers
        config = layers.config
        chosen_by = Block.of(config, layers.clips)
        sizes = tensor_bytes(config, *layers.op_hw(*size), itemsize=weight.element_size())
        # With a squeeze-excite, the depthwise result of an image is kept until its gate is known.
        saved = sizes.expanded + (0 if config.squeeze_channels else sizes.depthwise)
    reason, backend, kernel = block.why_plain(x), None, None
    if reason is None:
        asked = next((b for b in BACKENDS if b.name == block.backend), None)
        chosen = asked or next(b for b in BACKENDS if b.why_not(x, chosen_by) is None)
        backend, reason = chosen.name, chosen.why_refused(x, chosen_by)
        if backend == "cuda" and reason is None and chosen_by is not None:
            kernel = cuda_kernel(x, chosen_by)
    elif state == "fused":
        state = "plain"
    return Row(name, state, config, backend, reason, size, saved, kernel)


def _input_sizes(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """Module name -> (H, W) of its input, from a run of a copy on the meta device."""
    tensors = list(chain(model.parameters(), model.buffers()))
    # Given to deepcopy as already copied, the weights are not copied.
    memo = {id(t): _on_meta(t) for t in tensors}
    shadow = copy.deepcopy(model, memo).eval()
    sizes = {}
    for name, module in shadow.named_modules():
        if isinstance(module, FusedModule):
            module.backend = None
        elif isinstance(module, FusedChain):
            module.forward = module.plain_forward

        def remember(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
                sizes[name] = tuple(args[0].shape[2:])

        module.register_forward_pre_hook(remember)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    try:
        with torch.no_grad():
            shadow(torch.empty((1, *shape), dtype=dtype, device="meta"))
    except Exception as error:
        said = f"explain: input_shape must be one that the model takes, got {shape}: {error}"
        raise ValueError(said) from error
    return sizes


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    shadow = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shadow, requires_grad=tensor.requires_grad)
    return shadow
