"""`plan`: a whole network as one call on one small arena.

Where every block is fused, what is left of memory and time is between the blocks: their inputs and
outputs, and a call of Python and of the dispatcher for each. A plan knows all sizes beforehand. It
lays the tensors of an image out in one arena; lets the first layers, whose tensors are the largest,
stream into one another a few rows at a time; overwrites the input of a residual block row by row;
and runs as one op, `torch.ops.mnv2.run_plan`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import figures, program, step_memory
from .arena import arrange, describe
from .extension import missing
from .lowering import cast, read_layers
from .ops import inverted_residual
from .program import Block, Layer, Pool, Shape, Stem, Step
from .recognizers import Declined, check_module

_library = torch.library.Library("mnv2", "FRAGMENT")
_library.define(
    "run_plan(Tensor x, Tensor?[] weights, int[] program, float[] bounds) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)


@torch.library.register_fake("mnv2::run_plan", lib=_library)
def _fake(x, weights, integers, bounds):
    torch._check_value(x.dim() == 4, lambda: f"run_plan: x must have 4 dimensions, got {x.dim()}")
    dims = integers[3]
    y = x.new_empty((x.shape[0], *integers[4 : 4 + dims]))
    return y.to(memory_format=torch.channels_last) if dims == 3 else y


if missing is not None:

    def _unavailable(*args):
        raise RuntimeError(f"run_plan: {missing}")

    _library.impl("run_plan", _unavailable, "CPU")


@dataclass(frozen=True)
class Row:
    """One line of a printed plan.

    name: in the model. rows: of the result that are in memory at a time, None for all. offset: of
    the result in the arena, bytes; None where it is not there. nbytes: of the rows in memory.
    """

    name: str
    layer: str
    shape: Shape
    rows: int | None
    offset: int | None
    nbytes: int


class Plan:
    """A network of fixed weights and image size, ready to run; made by `plan`.

    plan(x) is what the model gives for x (N, C, H, W), for any N. Weights are copies, with batch
    norm folded in: later changes of the model do not reach them.
    """

    def __init__(self, names: Sequence[str], steps: Sequence[Step], shape: Shape, arena: int):
        self.input_shape = shape
        self.names = tuple(names)
        self.steps = tuple(steps)
        self._arena = arena
        self._program = program.encode(steps, shape, arena)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> what the model returns for it.

        Raises:
            ValueError, TypeError: x has another shape, dtype or device than the plan.
        """
        self._check(x)
        if x.device.type == "cpu":
            p = self._program
            return torch.ops.mnv2.run_plan(x, p.weights, p.integers, p.bounds)
        for step in self.steps:
            x = _run(step.layer, x)
        return x

    def capture(self, batch: int = 1) -> "CapturedPlan":
        """The plan for `batch` images in a CUDA graph: one launch instead of one a step.

        Raises:
            RuntimeError: the plan is not on a CUDA device.
        """
        if self.device.type != "cuda":
            raise RuntimeError(
                f"capture: the plan must be on a CUDA device, it is on {self.device}"
            )
        return CapturedPlan(self, batch)

    @property
    def dtype(self) -> torch.dtype:
        return next(w for w in self._program.weights if w is not None).dtype

    @property
    def device(self) -> torch.device:
        return next(w for w in self._program.weights if w is not None).device

    @property
    def arena_bytes(self) -> int:
        """Bytes of all tensors between the steps, for one image."""
        return self._arena * self.dtype.itemsize

    def line_bytes(self, threads: int = 1) -> int:
        """Bytes of line buffers and scratch beside the arena, of `threads` threads on one image."""
        return describe(self._program, threads)["line_bytes"]

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.input_shape or x.dim() != 4:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(f"plan: x must have shape (N, {wanted}), got {tuple(x.shape)}")
        if x.dtype != self.dtype or x.device != self.device:
            raise TypeError(
                f"plan: x must be {self.dtype} on {self.device}, got {x.dtype} on {x.device}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise TypeError("plan: x must not require gradients, a plan has none")

    def rows(self) -> list[Row]:
        """The schedule, a line for every step."""
        found = []
        results = program.shapes(self.steps, self.input_shape)
        lines = describe(self._program, 1)["rows_in_memory"] if self.device.type == "cpu" else []
        for i, (step, shape) in enumerate(zip(self.steps, results, strict=True)):
            last = i + 1 == len(self.steps)
            rows = lines[i] if step.streams and lines else None
            elements = shape[0] * (shape[2] * (rows or shape[1]) if len(shape) == 3 else 1)
            found.append(
                Row(
                    name=self.names[i],
                    layer=_describe_layer(step.layer),
                    shape=shape,
                    rows=rows,
                    offset=None if last or step.streams else step.offset * self.dtype.itemsize,
                    nbytes=elements * self.dtype.itemsize,
                )
            )
        return found

    def figure(self, path: Path | str) -> None:
        """Save a figure of what each step uses, by arithmetic, of one image and with it in bytes.

        Beside the plan: the same layers run eagerly, what a call holds from first to last,
        and the paper's bound M(G). The ending of `path` is the figure's format. Weights do not
        count.

        Raises:
            MissingPackage: matplotlib is not installed.
            OSError, ValueError: the file cannot be written, or matplotlib does not know its ending.
        """
        itemsize = self.dtype.itemsize
        sizes = {"steps": self.steps, "shape": self.input_shape, "itemsize": itemsize}
        rows = self.rows()
        held = {
            "eager": step_memory.live_bytes(execution="eager", **sizes),
            "planned": step_memory.planned_in_use(line_bytes=[r.nbytes for r in rows], **sizes),
        }
        levels = {"paper's M(G)": step_memory.paper_bound(**sizes)}
        if self.device.type == "cpu":
            lines = self.line_bytes()
            levels["held by a call, with its scratch"] = step_memory.planned_bytes(
                image=itemsize * math.prod(self.input_shape),
                result=rows[-1].nbytes,
                arena=self.arena_bytes,
                lines_of_one=lines,
                lines_of_all=lines,
            )
        positions = range(len(rows) + 1)
        timelines = {name: (positions, [*bytes_, bytes_[-1]]) for name, bytes_ in held.items()}
        figures.draw([figures.Panel("plan", timelines, levels, "step")], path)

    def __str__(self) -> str:
        heading = ("step", "layer", "result", "rows in memory", "arena offset", "bytes")
        lines = [heading]
        rows = self.rows()
        for row in rows:
            where = "result" if row is rows[-1] else "streams"
            lines.append(
                (
                    row.name or "(the model)",
                    row.layer,
                    "x".join(map(str, row.shape)),
                    "all" if row.rows is None else str(row.rows),
                    f"{row.offset:,}" if row.offset is not None else where,
                    f"{row.nbytes:,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        totals = f"arena {self.arena_bytes:,} bytes"
        if self.device.type == "cpu":
            totals += f"; line buffers and scratch {self.line_bytes():,} bytes for one thread"
        return f"{table}\n{totals}"

    __repr__ = __str__


class CapturedPlan:
    """A plan in a CUDA graph, for one batch size; made by `Plan.capture`.

    Calls write to the same result, which the next call overwrites.
    """

    def __init__(self, plan: Plan, batch: int):
        self._x = torch.zeros((batch, *plan.input_shape), dtype=plan.dtype, device=plan.device)
        self._x = self._x.contiguous(memory_format=torch.channels_last)
        stream = torch.cuda.Stream(plan.device)
        stream.wait_stream(torch.cuda.current_stream(plan.device))
        # Libraries choose algorithms and allocate in their first calls, which a graph cannot hold.
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):
                plan(self._x)
        torch.cuda.current_stream(plan.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.inference_mode():
            self._y = plan(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """x of the captured shape -> the result, which the next call overwrites.

        Raises:
            ValueError: x has another shape.
        """
        if x.shape != self._x.shape:
            raise ValueError(
                f"capture: x must have shape {tuple(self._x.shape)}, got {tuple(x.shape)}"
            )
        self._x.copy_(x)
        self._graph.replay()
        return self._y


def plan(model: nn.Module, input_shape: Sequence[int], *, dtype: torch.dtype | None = None) -> Plan:
    """The whole model as one call on one preplanned arena.

    Args:
        model: a chain of a stem (3x3, stride 2), inverted residual blocks, a last 1x1 convolution
            with average pool and a classifier, any of which may be missing but the blocks:
            MobileNetV2 and relatives of this package, torchvision and timm, fused or not, at any
            width, resolution and number of classes. Its training mode does not matter: a plan
            infers.
        input_shape: (C, H, W) of an image, or (N, C, H, W); a plan takes any N.
        dtype: of weights and input; None takes that of the model. float32 on a CPU.

    Returns:
        A `Plan`: call it as the model, print it to see its schedule.

    Raises:
        TypeError: model is not a module, or dtype is none that runs on its device.
        ValueError: the model is no such chain, or input_shape does not fit it.
    """
    check_module("plan", model)
    shape = tuple(input_shape)[-3:]
    if len(input_shape) not in (3, 4) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"plan: input_shape must be (C, H, W) or (N, C, H, W), got {tuple(input_shape)}"
        )
    try:
        named = read_layers(model)
    except Declined as reason:
        kind = type(model).__name__
        raise ValueError(f"plan: {kind} cannot be run as a plan: {reason}") from None
    named = [(name, cast(layer, dtype)) for name, layer in named]
    names = [name for name, _ in named]
    steps, arena = arrange(named, shape)
    made = Plan(names, steps, shape, arena)
    if made.device.type == "cpu" and made.dtype != torch.float32:
        raise TypeError(f"plan: dtype must be torch.float32 on a CPU, got {made.dtype}")
    return made


def _describe_layer(layer: Layer) -> str:
    match layer:
        case Stem():
            return f"3x3 convolution, {layer.in_channels} to {layer.out_channels} channels"
        case Block():
            return f"block {layer.config.name}" + " residual" * layer.config.residual
        case Pool():
            convolution = "" if layer.weight is None else "1x1 convolution and "
            return f"{convolution}mean, {layer.in_channels} to {layer.out_channels} channels"
    return f"linear, {layer.in_features} to {layer.out_features}"


def _run(layer: Layer, x: Tensor) -> Tensor:
    """A step where there is no kernel for the whole network."""
    match layer:
        case Stem():
            top, left, bottom, right = layer.padding
            x = F.pad(x, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
            weight = layer.weight.permute(3, 2, 1, 0)
            return F.conv2d(x, weight, layer.bias.to(x.dtype), 2).clamp_(*layer.clip)
        case Block():
            c = layer.config
            return inverted_residual(
                x,
                layer.weights,
                stride=c.stride,
                padding=c.padding,
                dilation=c.dilation,
                residual=c.residual,
            )
        case Pool():
            if layer.weight is not None:
                weight = layer.weight.t()[:, :, None, None]
                x = F.conv2d(x, weight, layer.bias.to(x.dtype)).clamp_(*layer.clip)
            return x.mean((2, 3))
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight, bias)
