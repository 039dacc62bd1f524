"""`explain`: which blocks of a model run fused, which could, and why the others do not."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import nn

from ..block.config import BlockConfig
from ..block.cost import tensor_bytes
from ..modules.fused_module import FusedModule
from ..network.lower import check_steps
from ..ops.backends import BACKENDS, Block, cuda_kernel
from ..recognizers import (
    Declined,
    check_module,
    evaluation_mode,
    is_depthwise_weight,
    read_unknown,
)
from .find import Found, find
from .model import is_whole
from .sequential import FusedChain

State = Literal["fused", "plain", "fusable", "declined"]


@dataclass(frozen=True)
class Row:
    """One block of a model.

    state: "fused" runs in one pass; "plain" would if it could, now runs layer by layer;
    "fusable" is an original that `fuse` would replace; "declined" looks like such a block but
    cannot be fused exactly. reason: why it does not run fused. backend: the name of what runs
    after `fuse`, None for the plain layers. input_hw, bytes_saved (expansion and depthwise output
    of one image) and kernel (which one of the backend "cuda") are known with an input shape only.
    """

    name: str
    state: State
    config: BlockConfig | None = None
    backend: str | None = None
    reason: str | None = None
    input_hw: tuple[int, int] | None = None
    bytes_saved: int | None = None
    kernel: str | None = None


class Report(tuple[Row, ...]):
    """The rows in the order of the model; prints as a table and a summary.

    outside: names of the depthwise convolutions that are in no block which runs fused or could.
    runs_as_one: whether calls for inference on a CPU run as one. why_no_plan: why `plan` would
    refuse the model, None where it would not.
    """

    outside: tuple[str, ...] = ()
    runs_as_one: bool = False
    why_no_plan: str | None = None

    @property
    def summary(self) -> str:
        """What the rows come to, in a few sentences."""
        fused, fusable = (sum(r.state == s for r in self) for s in ("fused", "fusable"))
        sentences = []
        if self:
            verb = "run" if fused or not fusable else "can run"
            sentences.append(f"{fused or fusable} of {len(self)} blocks {verb} fused.")
        else:
            sentences.append("No inverted residual block was found.")
        reasons = Counter(row.reason for row in self if row.reason is not None)
        for reason, count in reasons.most_common(3):
            sentences.append(f"{count} {'does' if count == 1 else 'do'} not: {reason}.")
        if self.outside:
            names = ", ".join(self.outside[:3]) + (", ..." if len(self.outside) > 3 else "")
            count = len(self.outside)
            plural = "s are" if count > 1 else " is"
            sentences.append(f"{count} depthwise convolution{plural} in no such block: {names}.")
        if self.runs_as_one:
            sentences.append("Inference on a CPU runs as one call.")
        if self:
            plan = "has a plan" if self.why_no_plan is None else f"has no plan: {self.why_no_plan}"
            sentences.append(f"The model {plan}.")
        return " ".join(sentences)

    @property
    def bytes_saved(self) -> int:
        """Bytes of all expanded and depthwise tensors of one image, as far as they are known."""
        return sum(row.bytes_saved or 0 for row in self)

    def __str__(self) -> str:
        if not self:
            return self.summary
        heading = ("block", "state", "shape", "input", "backend", "saved", "why not")
        lines = [heading, *map(_cells, self)]
        if self.bytes_saved:
            lines.append(("all", "", "", "", "", _bytes(self.bytes_saved), ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return f"{table}\n{self.summary}"

    __repr__ = __str__


def explain(model: nn.Module, *, input_shape: tuple[int, ...] | None = None) -> Report:
    """What `fuse` did or would do, block by block; prints as a table.

    The report is a tuple of one `Row` a block.

    Example:
        >>> report = mk.explain(mk.fuse(mk.mobilenet_v2()))
        >>> len(report), report[0].name
        (17, 'features.1')

    Args:
        model: any module, fused or not. It is left as it is.
        input_shape: of the model's input, (N, C, H, W). With it the report has sizes and bytes
            too, from a run on the meta device, which computes shapes only.

    Raises:
        TypeError: model is not a module.
    """
    check_module("explain", model)
    sizes = {} if input_shape is None else _input_sizes(model, input_shape)
    with evaluation_mode(model):
        blocks = list(find(model))
        why_no_plan = _why_no_plan(model)
    report = Report(_rows(blocks, sizes))
    report.outside = tuple(_outside(model, blocks))
    report.runs_as_one = any(map(is_whole, model.modules())) and why_no_plan is None
    report.why_no_plan = why_no_plan
    return report


def _why_no_plan(model: nn.Module) -> str | None:
    try:
        check_steps(read_unknown(model).layers)
    except Declined as reason:
        return str(reason)
    return None


def _outside(model: nn.Module, blocks: list[Found]) -> Iterator[str]:
    """The depthwise convolutions that are in no block that runs fused, or could."""
    inside: set[nn.Module] = set()
    for found in blocks:
        if found.reason is not None:
            continue
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
        config = config if layers is None else layers.config
        chosen_by = Block.of(config, block.block_layers.clips)
        sizes = tensor_bytes(config, *size, itemsize=weight.element_size())
        saved = sizes.expanded + sizes.depthwise
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


def _input_sizes(model: nn.Module, input_shape: Iterable[int]) -> dict[str, tuple[int, int]]:
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

        def remember(module, args, name=name):
            if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
                sizes[name] = tuple(args[0].shape[2:])

        module.register_forward_pre_hook(remember)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    with torch.no_grad():
        shadow(torch.empty(tuple(input_shape), dtype=dtype, device="meta"))
    return sizes


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    shadow = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shadow, requires_grad=tensor.requires_grad)
    return shadow


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name or "(the model)",
        row.state,
        row.config.name + (" residual" * row.config.residual) if row.config else "",
        "x".join(map(str, row.input_hw)) if row.input_hw else "",
        f"{row.backend}: {row.kernel}" if row.kernel else row.backend or "",
        "" if row.bytes_saved is None else _bytes(row.bytes_saved),
        row.reason or "",
    )


def _bytes(number: int) -> str:
    return f"{number / 2**10:.1f} KiB" if number < 2**20 else f"{number / 2**20:.2f} MiB"
