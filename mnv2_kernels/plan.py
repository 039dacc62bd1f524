"""`plan`: a whole network as one call on one small arena.

Where every block is fused, what is left of memory and time is between the blocks: their inputs and
outputs, and a call of Python and of the dispatcher for each. A plan knows all sizes beforehand. It
lays the tensors of an image out in one arena; lets the first layers, whose tensors are the largest,
stream into one another a few rows at a time; overwrites the input of a residual block row by row;
and runs as one op, `torch.ops.mnv2.run_plan`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import figures, program, step_memory
from .block import NO_CLIP
from .extension import missing
from .extension import module as _C
from .fold import fold_conv_norm, fold_layers
from .fused import FusedModule
from .ops import inverted_residual
from .program import Block, Layer, Linear, Pool, Program, Shape, Stem, Step
from .recognizers import Declined, check_module, network, recognize

_ALIGNMENT = 16  # elements: 64 bytes

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
        return _describe(self._program, threads)["line_bytes"]

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
        lines = _describe(self._program, 1)["rows_in_memory"] if self.device.type == "cpu" else []
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
        layers = network.read_network(model, _read_block)
        named = list(_layers(layers))
    except Declined as reason:
        kind = type(model).__name__
        raise ValueError(f"plan: {kind} cannot be run as a plan: {reason}") from None
    named = [(name, _cast(layer, dtype)) for name, layer in named]
    names, steps, arena = _arrange(named, shape)
    made = Plan(names, steps, shape, arena)
    if made.device.type == "cpu" and made.dtype != torch.float32:
        raise TypeError(f"plan: dtype must be torch.float32 on a CPU, got {made.dtype}")
    return made


def _read_block(module: nn.Module):
    if not isinstance(module, FusedModule):
        return recognize(module)
    changed = module._watched.why_changed()
    if changed is not None:
        raise Declined(changed)
    return module.block_layers


def _layers(layers: Sequence[network.Layer]) -> Iterator[tuple[str, Layer]]:
    """The steps that layers of a model are, each with its name."""
    layers = list(layers)
    if not layers:
        raise Declined("it has no layers")
    channels = None
    averaged = False
    while layers:
        layer = layers.pop(0)
        if averaged and not isinstance(layer, network.Classifier):
            raise Declined(f"{layer.name} must not follow an average over all pixels")
        match layer:
            case network.Block(name, block):
                with torch.no_grad():
                    weights = fold_layers(block)
                channels = block.config.out_channels
                yield name, Block(block.config, weights)
            case network.Convolution(name, stage) if stage.conv.kernel_size == (3, 3):
                yield name, _stem(layer)
            case network.Convolution(name):
                if not (layers and isinstance(layers[0], network.Pool)):
                    raise Declined(f"{name} must be followed by an average over all pixels")
                _take_average(layers)
                averaged = True
                yield name, _pool(layer)
            case network.Classifier(name, linear):
                if not averaged:
                    raise Declined(f"{name} must follow an average over all pixels")
                bias = None if linear.bias is None else linear.bias.detach().float()
                weight = linear.weight.detach().clone()
                yield name, Linear(linear.in_features, linear.out_features, weight, bias)
            case network.Pool(name):
                layers.insert(0, layer)
                _take_average(layers)
                if channels is None:
                    raise Declined(f"{name} must follow a block")
                averaged = True
                yield name, Pool(channels, channels, None, None, NO_CLIP)
            case network.Flatten(name):
                raise Declined(f"{name} must follow an average over all pixels")


def _take_average(layers: list[network.Layer]) -> None:
    """Remove an average over pixels and its flattening from the front."""
    pool = layers.pop(0)
    if pool.keeps_dims:
        if not (layers and isinstance(layers[0], network.Flatten)):
            raise Declined(f"{pool.name} must be flattened")
        layers.pop(0)


def _folded(convolution: network.Convolution) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return fold_conv_norm(convolution.stage)


def _stem(convolution: network.Convolution) -> Stem:
    conv, padding = convolution.stage.conv, convolution.padding
    found = (conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    if found != ((3, 3), (2, 2), (1, 1), 1) or max(padding) > 2:
        raise Declined(
            f"{convolution.name} must be a 3x3 convolution with stride 2, dilation 1, 1 group and"
            f" at most 2 zeros around its input, got kernel_size={found[0]}, stride={found[1]},"
            f" dilation={found[2]}, groups={found[3]}, padding={padding}"
        )
    weight, bias = _folded(convolution)
    weight = weight.permute(3, 2, 1, 0).contiguous()
    return Stem(conv.in_channels, conv.out_channels, padding, weight, bias, convolution.stage.clip)


def _pool(convolution: network.Convolution) -> Pool:
    conv, padding = convolution.stage.conv, convolution.padding
    found = (conv.kernel_size, conv.stride, conv.groups, padding)
    if found != ((1, 1), (1, 1), 1, (0, 0, 0, 0)):
        raise Declined(
            f"{convolution.name} must be a 1x1 convolution with stride 1, 1 group and no padding,"
            f" got kernel_size={found[0]}, stride={found[1]}, groups={found[2]},"
            f" padding={found[3]}"
        )
    weight, bias = _folded(convolution)
    weight = weight[:, :, 0, 0].t().contiguous()
    return Pool(conv.in_channels, conv.out_channels, weight, bias, convolution.stage.clip)


def _cast(layer: Layer, dtype: torch.dtype | None) -> Layer:
    """The layer with weights in a dtype; biases stay in float32 at least."""
    if dtype is None:
        return layer
    if isinstance(layer, Block):
        w = layer.weights
        tensors = {n: getattr(w, n) for n in ("w_expand", "w_dw", "w_project")}
        cast = {n: t if t is None else t.to(dtype) for n, t in tensors.items()}
        return replace(layer, weights=replace(w, **cast))
    weight = layer.weight
    return layer if weight is None else replace(layer, weight=weight.to(dtype))


def _arrange(named: Sequence[tuple[str, Layer]], shape: Shape) -> tuple[list[str], list[Step], int]:
    """Names, steps and the size of the arena in elements."""
    names = [name for name, _ in named]
    steps = [Step(layer) for _, layer in named]
    first = steps[0].layer
    channels = first.config.in_channels if isinstance(first, Block) else first.in_channels
    if shape[0] != channels:
        raise ValueError(f"plan: input_shape must have {channels} channels, got {shape}")
    results = program.shapes(steps, shape)
    for name, result in zip(names, results, strict=True):
        if min(result) < 1:
            raise ValueError(f"plan: input_shape {shape} is too small for {name}")
    row_by_row = _row_by_row(steps, shape)
    sizes = [_aligned(math.prod(result)) for result in results]
    for i in range(len(steps) - 1):
        # Tensors that shrink on the way: from the image to the first small one.
        if row_by_row[i] and row_by_row[i + 1] and sizes[i] > sizes[i + 1]:
            steps[i] = replace(steps[i], streams=True)
    kept = [i for i, step in enumerate(steps[:-1]) if not step.streams]
    in_place = {i for i in kept if row_by_row[i] and _overwrites(steps, i)}
    # Every step finds its input at one end of the arena and leaves its result at the other, or in
    # the place of its input.
    arena = max((sizes[i] for i in kept), default=0)
    for before, i in pairwise(kept):
        if i not in in_place:
            arena = max(arena, sizes[before] + sizes[i])
    at_end = True
    for i in kept:
        at_end = at_end if i in in_place else not at_end
        steps[i] = replace(steps[i], offset=arena - sizes[i] if at_end else 0)
    return names, steps, arena


def _overwrites(steps: Sequence[Step], i: int) -> bool:
    """Whether a step can write its result over its input, which is in the arena."""
    layer = steps[i].layer
    from_arena = i > 0 and not steps[i - 1].streams
    return (
        from_arena and isinstance(layer, Block) and layer.config.residual and layer.config.expansion
    )


def _row_by_row(steps: Sequence[Step], shape: Shape) -> list[bool]:
    """Which steps go through the image once, row by row, so that they can stream."""
    weights = program.encode(steps, shape, 0).weights
    if _C is None or any(w is not None and w.device.type != "cpu" for w in weights):
        return [False] * len(steps)
    apart, offset = [], 0
    for step, result in zip(steps, program.shapes(steps, shape), strict=True):
        apart.append(replace(step, offset=offset))
        offset += _aligned(math.prod(result))
    return _describe(program.encode(apart, shape, offset), 1)["row_by_row"]


def _describe(p: Program, threads: int) -> dict:
    if _C is None:
        raise RuntimeError(f"plan: {missing}")
    return _C.describe_program(p.integers, p.bounds, threads)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


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
