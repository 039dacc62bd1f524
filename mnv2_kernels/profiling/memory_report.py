"""What a network holds, computed and measured, step by step: eager, folded, fused and planned.

eager runs layer by layer as written, folded with batch norm in the convolutions, fused with every
block in one pass, planned as one call on one arena. Weights are left out, images and result are
counted.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..block import cost
from ..modules.fused_module import FusedModule
from ..network import memory
from ..network.figures import Panel, Timeline, draw
from ..network.plan import Plan, why_not_on_cpu
from .memory import live_bytes, peak_bytes, peak_bytes_again
from .variants import fold_around_blocks, training_variants, variants

EXECUTIONS = (*cost.EXECUTIONS, "planned")


@dataclass(frozen=True)
class Memory:
    """What one execution of a network held, bytes.

    computed: by step, by arithmetic: a lower bound for eager and folded, where PyTorch's kernels
    have scratch and modules hold tensors inside a block; without the kernels' scratch for fused;
    exact for planned. measured: by step, most that the allocator's events show;
    None for a step that is no module by itself, whose events count to the step before it.
    timeline: all that they show; position i is where step i began. why_not_measured: the sentence
    where the kernels do not run this dtype, so that nothing is measured.
    """

    computed: list[int]
    measured: list[int | None]
    timeline: Timeline
    why_not_measured: str | None = None

    @property
    def peak_computed(self) -> int:
        return max(self.computed)

    @property
    def peak_measured(self) -> int | None:
        return max((bytes_ for bytes_ in self.measured if bytes_ is not None), default=None)


@dataclass(frozen=True)
class MemoryReport:
    """The memory of every execution of one network, made by `measure`."""

    model: str
    x_shape: tuple[int, ...]
    dtype: torch.dtype
    threads: int
    steps: list[str]
    executions: dict[str, Memory]
    paper_bound: int
    arena_bytes: int
    line_bytes: int
    weight_bytes: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def document(self) -> dict[str, object]:
        """Every figure, in bytes, for JSON."""
        return {
            "model": self.model,
            "x_shape": list(self.x_shape),
            "dtype": self.dtype_name,
            "threads": self.threads,
            "paper_bound_bytes": self.paper_bound,
            "plan": {"arena_bytes": self.arena_bytes, "line_bytes": self.line_bytes},
            "weight_bytes_not_counted": self.weight_bytes,
            "steps": self.steps,
            "executions": {
                name: {
                    "peak_bytes_computed": held.peak_computed,
                    "peak_bytes": held.peak_measured,
                    "computed_by_step": held.computed,
                    "by_step": held.measured,
                    "why_not_measured": held.why_not_measured,
                }
                for name, held in self.executions.items()
            },
        }

    def figure(self, path: Path) -> None:
        """Draw the live bytes of every measured execution over the steps, and the paper's bound.

        Raises:
            MissingPackage: matplotlib is not installed.
            OSError, ValueError: as `figures.draw`.
        """
        title = f"{self.model}, {'x'.join(map(str, self.x_shape))}, {self.dtype_name}"
        timelines = {
            name: held.timeline
            for name, held in self.executions.items()
            if held.why_not_measured is None
        }
        draw([Panel(title, timelines, {"paper's M(G)": self.paper_bound}, "step")], path)


@torch.inference_mode()
def measure(
    name: str,
    model: nn.Module,
    plan: Plan,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    tell: Callable[[str], None] = lambda what: None,
) -> MemoryReport:
    """Run every execution on one random input; compare what it held with what it should hold.

    Args:
        name: of the model, for the report.
        model: a model on the CPU.
        plan: of that model, in `dtype`; in another one where the kernels do not run `dtype`, and
            then fused and planned are computed alone, with the plan's line buffers as they are.
        dtype: of weights, images and result.
        tell: gets the name of each execution before it is measured.
    """
    why_not = why_not_on_cpu(dtype)
    if why_not is None and plan.dtype != dtype:
        raise ValueError(f"measure: plan must be one of {dtype}, got one of {plan.dtype}")
    itemsize = dtype.itemsize
    sizes = {"batch": batch, "itemsize": itemsize}
    x = torch.randn(batch, *plan.input_shape).to(dtype, memory_format=torch.channels_last)
    of_callers = held_by_callers(model, plan, **sizes)
    model = deepcopy(model).to(dtype)
    found = {}
    for execution, copy in executions(model).items():
        tell(execution)
        computed = memory.live_bytes(plan.steps, plan.input_shape, execution=execution, **sizes)
        computed = [a + b for a, b in zip(computed, of_callers, strict=True)]
        reason = why_not if execution == "fused" else None
        held = timeline(copy, plan.names, x) if reason is None else None
        found[execution] = _memory(computed, held, reason)
    computed = [planned_bytes(plan, **sizes)] * len(plan.steps)
    found["planned"] = _memory(computed, None, why_not)
    if why_not is None:
        plan(x)
        # A call holds the same from its first step to its last.
        peak = x.nbytes + max(live_bytes(lambda: plan(x))) + plan.owned_bytes
        found["planned"] = _memory(computed, [[peak] for _ in plan.steps])
    return MemoryReport(
        model=name,
        x_shape=tuple(x.shape),
        dtype=dtype,
        threads=torch.get_num_threads(),
        steps=list(plan.names),
        executions=found,
        paper_bound=memory.paper_bound(plan.steps, plan.input_shape, **sizes),
        arena_bytes=_elements(plan, plan.arena_bytes) * itemsize,
        line_bytes=plan.line_bytes(torch.get_num_threads()),
        weight_bytes=sum(p.nbytes for p in (*model.parameters(), *model.buffers())),
    )


@torch.inference_mode()
def peaks(
    model: nn.Module, x: Tensor, *, tell: Callable[[str], None] = lambda what: None
) -> dict[str, int]:
    """Most bytes that each execution of a model holds for x, which has the dtype of the images.

    For models that have no plan: image and result are counted, weights are not.
    """
    found = {}
    for execution, copy in variants(deepcopy(model).to(x.dtype)).items():
        tell(execution)
        found[execution] = x.nbytes + peak_bytes_again(lambda copy=copy: copy(x))
    return found


def training_peaks(
    model: nn.Module, x: Tensor, *, tell: Callable[[str], None] = lambda what: None
) -> dict[str, int]:
    """Most bytes that a training step for x holds beyond parameters and image, by execution.

    The step is forward pass, the sum of the squares of all results, and backward pass; the
    gradients are among the bytes.
    """
    found = {}
    for execution, copy in training_variants(deepcopy(model).to(x.dtype)).items():

        def step(copy: nn.Module = copy) -> None:
            results = [y for y in tree_leaves(copy(x)) if isinstance(y, Tensor)]
            sum(y.square().sum() for y in results if y.requires_grad).backward()

        tell(execution)
        step()
        copy.zero_grad()
        found[execution] = peak_bytes(step)
    return found


def planned_bytes(plan: Plan, batch: int = 1, itemsize: int | None = None) -> int:
    """Bytes that a call of the plan on the CPU holds at PyTorch's number of threads, input and
    result included. Tensors between the steps have `itemsize` bytes a number, None for the
    plan's dtype; line buffers and scratch are the plan's.
    """
    threads = torch.get_num_threads()
    itemsize = plan.dtype.itemsize if itemsize is None else itemsize
    return memory.planned_bytes(
        image=itemsize * math.prod(plan.input_shape),
        result=itemsize * _elements(plan, plan.rows()[-1].nbytes),
        arena=itemsize * _elements(plan, plan.arena_bytes),
        lines_of_one=plan.line_bytes(1),
        lines_of_all=plan.line_bytes(threads),
        features=plan.feature_bytes,
        batch=batch,
        threads=threads,
    )


def _elements(plan: Plan, nbytes: int) -> int:
    return nbytes // plan.dtype.itemsize


def held_by_callers(model: nn.Module, plan: Plan, batch: int = 1, itemsize: int = 4) -> list[int]:
    """Bytes, by step, of the inputs that modules around the step hold until they return.

    A call of a module holds its arguments, also where its first child has read them: timm's stages
    hold the tensor that came into them while all their blocks run. x is not counted, it is held
    anyway; nor is the input of the step itself.
    """
    sizes = [math.prod(plan.input_shape), *(math.prod(row.shape) for row in plan.rows())]
    modules = dict(model.named_modules())
    first: dict[str, int] = {}
    found = []
    for number, name in enumerate(plan.names):
        parts = name.split(".")
        around = [".".join(parts[:n]) for n in range(1, len(parts))]
        inputs = {
            first.setdefault(module, number)
            for module in around
            if not isinstance(modules.get(module), nn.ModuleList | nn.ModuleDict)
        }
        held = sum(sizes[i] for i in inputs - {0, number})
        found.append(batch * itemsize * held)
    return found


def executions(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of a model, by execution: all in evaluation mode with channels_last weights."""
    copies = variants(model)
    eager = copies["eager"].to(memory_format=torch.channels_last)
    # A profiler sees the layers one by one.
    fused = fold_around_blocks(copies["fused"]).to(memory_format=torch.channels_last)
    return {"eager": eager, "folded": copies["folded"], "fused": fused}


def timeline(model: nn.Module, names: tuple[str, ...], x: Tensor) -> list[list[int] | None]:
    """Bytes that `model(x)` holds after each allocation and release, by step; x is included.

    A step begins where the module of its name is called and holds what was there then, so that no
    list is empty; a name that is no module's has None.
    """
    modules = _by_name(model)
    marked = [i for i, name in enumerate(names) if name in modules]
    handles = [modules[names[i]].register_forward_pre_hook(_mark) for i in marked]
    try:
        model(x)
        changes = live_bytes(lambda: model(x))
    finally:
        for handle in handles:
            handle.remove()
    segments, held, i = [[x.nbytes]], 0, 0
    while i < len(changes):
        if changes[i : i + 2] == [held + _MARK_BYTES, held]:
            segments.append([x.nbytes + held])
            i += 2
            continue
        held = changes[i]
        segments[-1].append(x.nbytes + held)
        i += 1
    # Before the first step of all there is nothing but x.
    by_step = dict(zip(marked, segments[1:], strict=True))
    return [by_step.get(i) for i in range(len(names))]


def _by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules; in the place of what is inside a fused one that one, which would run its layers
    if something in it had a hook.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        around = found.get(name.rpartition(".")[0])
        found[name] = around if isinstance(around, FusedModule) else module
    return found


_MARK_BYTES = 1


def _mark(*_) -> None:
    torch.empty(_MARK_BYTES, dtype=torch.uint8)


def timeline_of(held: list[list[int] | None]) -> Timeline:
    """What `timeline` gives, for a figure: position i is where step i began."""
    positions: list[float] = []
    bytes_: list[int] = []
    for number, step in enumerate(held):
        for i, live in enumerate(step or []):
            positions.append(number + i / len(step))
            bytes_.append(live)
    positions.append(len(held))
    bytes_.append(bytes_[-1])
    return positions, bytes_


def _memory(
    computed: list[int], held: list[list[int] | None] | None, why_not: str | None = None
) -> Memory:
    if held is None:
        return Memory(computed, [None] * len(computed), ([], []), why_not)
    measured = [None if step is None else max(step) for step in held]
    return Memory(computed, measured, timeline_of(held))
