"""`plan`: a whole network as one call on one small arena.

Where every block is fused, what is left of memory and time is between the blocks: their inputs and
outputs, and a call of Python and of the dispatcher for each. A plan knows all sizes beforehand. It
lays the tensors of an image out in one arena; lets the first layers, whose tensors are the largest,
stream into one another a few rows at a time; overwrites the input of a residual block row by row;
and runs as one op (`plan_op.py`), which allocates the arena or gets one that the plan owns.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import triton
from ..ops.backends import BACKENDS, takes_triton, warn_if_layers_run
from ..ops.extension import missing
from ..ops.inverted_residual import inverted_residual
from ..ops.reference import activate
from ..recognizers import Declined, check_module
from . import figures, program
from . import memory as step_memory
from . import run_plan as plan_op
from .arena import OwnedArena, arrange, describe
from .lower import cast, chain_of, image_shape, lower, names_of
from .plan_table import Row, describe_layer, table
from .program import Block, Layer, Linear, Pointwise, Pool, Shape, Stem, Step


class Plan:
    """A network of fixed weights and image size, ready to run; made by `plan`.

    plan(x) is what the model gives for x (N, C, H, W), for any N. Weights are copies, with batch
    norm folded in: later changes of the model do not reach them.

    Threads may call one plan at once. Where it owns its arena, a call waits for the one before it;
    copies of the plan (`copy.deepcopy`, pickle) own another one and run side by side. Compiled and
    exported programs allocate the arena in each call, also where the plan owns one.

    `torch.save(plan, path)` writes a plan, `torch.load(path, weights_only=False)` reads it: as any
    pickle, from a source that you trust.
    """

    def __init__(self, names: Sequence[str], steps: Sequence[Step], shape: Shape, arena: int):
        self.input_shape = shape
        self.names = tuple(names)
        self.steps = tuple(steps)
        self._arena = arena
        self._program = program.encode(steps, shape, arena)
        self._owned: OwnedArena | None = None
        self._owned_threads = 0

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> what the model returns for it.

        Raises:
            ValueError, TypeError: x has another shape, dtype or device than the plan.
        """
        self._check(x)
        if x.device.type == "cpu" and missing is None:
            p = self._program
            if self._owned is None or torch.compiler.is_compiling():
                return plan_op.run_plan(x, p.weights, p.integers, p.bounds)
            with self._owned.taken() as arena:
                return plan_op.run_plan_in(x, arena, p.weights, p.integers, p.bounds)
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
        return self._program.dtype

    @property
    def device(self) -> torch.device:
        return self._program.device

    @property
    def _has_kernel(self) -> bool:
        """Whether one kernel runs all steps; without, they run one by one, each in its own."""
        return self.device.type == "cpu" and missing is None

    @property
    def arena_bytes(self) -> int:
        """Bytes of all tensors between the steps, for one image: whole cache lines of 64."""
        return -(-self._arena * self.dtype.itemsize // 64) * 64

    @property
    def owned_bytes(self) -> int:
        """Bytes that the plan holds between calls besides its weights: arena, line buffers and
        scratch where it owns them, 0 where each call allocates them.
        """
        return 0 if self._owned is None else self._owned.nbytes

    @property
    def feature_bytes(self) -> int:
        """Bytes of one image that calls keep for up to 8 images of a batch: inputs of the fully
        connected layers at the end. 0 without any, and where the plan owns its arena.
        """
        layers = [step.layer for step in self.steps]
        tail = list(takewhile(lambda layer: isinstance(layer, Linear), reversed(layers)))
        if self._owned is not None or not tail or len(tail) == len(layers):
            return 0
        # Of a layer and of the next one.
        widest = max(layer.in_features for layer in tail) * min(len(tail), 2)
        return -(-widest * self.dtype.itemsize // 64) * 64

    def line_bytes(self, threads: int = 1) -> int:
        """Bytes of line buffers and scratch for one image on `threads` threads; no arena."""
        return describe(self._program, threads)["line_bytes"]

    def _own_arena(self) -> None:
        if self.device.type != "cpu":
            raise ValueError(
                f"plan: own_arena must be False for a model on {self.device}, where `capture` makes"
                " a call that keeps its memory"
            )
        if missing is not None:
            raise RuntimeError(f"plan: own_arena must be False here: {missing}")
        self._owned_threads = torch.get_num_threads()
        self._owned = OwnedArena(self._most_bytes(self._owned_threads))

    def _most_bytes(self, threads: int) -> int:
        """Bytes that a call needs besides x and its result, whatever its batch."""
        sizes = {"image": 0, "result": 0, "arena": self.arena_bytes, "threads": threads}
        sizes |= {"lines_of_one": self.line_bytes(1), "lines_of_all": self.line_bytes(threads)}
        return max(step_memory.planned_bytes(batch=n, **sizes) for n in (1, threads))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
            kind = "nested" if isinstance(x, Tensor) and x.is_nested else type(x).__name__
            got = x.layout if kind == "Tensor" else kind
            raise TypeError(f"plan: x must be a dense tensor, got {got}")
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
        lines = describe(self._program, 1)["rows_in_memory"] if self._has_kernel else []
        for i, (step, shape) in enumerate(zip(self.steps, results, strict=True)):
            last = i + 1 == len(self.steps)
            rows = lines[i] if step.streams and lines else None
            elements = shape[0] * (shape[2] * (rows or shape[1]) if len(shape) == 3 else 1)
            found.append(
                Row(
                    name=self.names[i],
                    layer=describe_layer(step.layer),
                    shape=shape,
                    rows=rows,
                    offset=None if last or step.streams else step.offset * self.dtype.itemsize,
                    nbytes=elements * self.dtype.itemsize,
                )
            )
        return found

    def figure(self, path: Path | str) -> None:
        """Save a figure of what each step uses, by arithmetic, of one image and with it in bytes.

        Also drawn: the same layers run eagerly, what a call holds from first to last, and
        the paper's bound M(G). The ending of `path` is the figure's format. Weights do not
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
        if self._has_kernel:
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
        totals = f"arena {self.arena_bytes:,} bytes"
        if self._has_kernel:
            totals += f"; line buffers and scratch {self.line_bytes():,} bytes for one thread"
            totals += f"; {self._describe_owner()}"
        else:
            totals += "; the steps run one by one, and allocate their results"
        return f"{table(self.rows())}\n{totals}"

    __repr__ = __str__

    def _describe_owner(self) -> str:
        if self._owned is None:
            return "allocated by each call"
        most = self._owned_threads
        threads = f"{most} threads" if most > 1 else "one thread"
        return f"owned by the plan: {self.owned_bytes:,} bytes for at most {threads}"


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
        # PyTorch keeps one stream to capture on for a process, on the GPU of its first capture.
        with torch.cuda.device(plan.device):
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream), torch.inference_mode():
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
        with torch.cuda.device(self._x.device):
            self._x.copy_(x)
            self._graph.replay()
        return self._y


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    own_arena: bool = False,
) -> Plan:
    """The whole model as one call on one preplanned arena.

    Example:
        >>> plan = mk.plan(mk.mobilenet_v2().eval(), (3, 224, 224))
        >>> plan(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1000])

    Args:
        model: a chain of a stem (3x3, stride 2), inverted residual blocks, a last 1x1 convolution
            with average pool and a classifier; all but the blocks are optional.
            MobileNetV2 and relatives of this package, torchvision and timm, fused or not, at any
            width, resolution and number of classes. Its training mode does not matter: a plan
            infers.
        input_shape: (C, H, W) of an image, or (N, C, H, W); a plan takes any N.
        dtype: of weights and input; None takes the model's. float32, bfloat16 or float16.
        own_arena: on a CPU, allocate arena, line buffers and scratch once, now: enough for any N on
            as many threads as PyTorch has now. Calls then allocate only their result (without a
            stem also a copy of an x that is not channels_last), and wait for one another: use one
            copy per thread.

    Returns:
        A `Plan`: call it as the model, print it to see its schedule.

    Raises:
        TypeError: model is not a module, or dtype is none that runs on its device.
        ValueError: the model is no such chain, input_shape does not fit it, or own_arena is asked
            for on another device than a CPU.
        RuntimeError: own_arena is asked for without the compiled kernels. Other plans run their
            steps one by one then.

    Warns:
        UserWarning: no kernel runs here; once in a process.
    """
    check_module("plan", model)
    shape = image_shape("plan", input_shape)
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"plan: dtype must be a torch.dtype, got {dtype!r}")
    try:
        layers = chain_of(model, shape)
        # Weights that need no folding would share memory with the model.
        named = deepcopy(lower(layers, names_of(layers, model)))
    except Declined as reason:
        kind = type(model).__name__
        raise ValueError(f"plan: {kind} cannot be run as a plan: {reason}") from None
    named = [(name, cast(layer, dtype)) for name, layer in named]
    names = [name for name, _ in named]
    steps, arena = arrange(named, shape)
    made = Plan(names, steps, shape, arena)
    if made.device.type == "cpu" and (reason := why_not_on_cpu(made.dtype)) is not None:
        raise TypeError(f"plan: dtype must be one of the CPU kernels, got {made.dtype}: {reason}")
    if own_arena:
        made._own_arena()
    warn_if_layers_run(made.device, may_move=False)
    return made


def why_not_on_cpu(dtype: torch.dtype) -> str | None:
    """None where the CPU kernels run images of a dtype, otherwise the sentence to show."""
    if missing is not None:
        return None  # The steps of a plan run one by one, in any dtype.
    cpu = next(backend for backend in BACKENDS if backend.name == "cpu")
    return cpu.why_not(torch.empty(0, dtype=dtype, device="cpu"))


def _run(layer: Layer, x: Tensor) -> Tensor:
    """A step where there is no kernel for the whole network."""
    match layer:
        case Stem() if takes_triton(x):
            return triton.stem(x, layer.weight, layer.bias, layer.padding, layer.clip)
        case Pool() if layer.weight is not None and takes_triton(x):
            return triton.pooled(x, layer.weight, layer.bias, layer.clip)
        case Stem():
            top, left, bottom, right = layer.padding
            x = F.pad(x, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
            weight = layer.weight.permute(3, 2, 1, 0)
            return activate(F.conv2d(x, weight, layer.bias.to(x.dtype), 2), layer.clip)
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
                x = activate(F.conv2d(x, weight, layer.bias.to(x.dtype)), layer.clip)
            return x.mean((2, 3))
        case Pointwise():
            weight = layer.weight.t()[:, :, None, None]
            return activate(F.conv2d(x, weight, layer.bias.to(x.dtype)), layer.clip)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return activate(F.linear(x, layer.weight, bias), layer.clip)
