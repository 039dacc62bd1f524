"""A network, or a part of one, as one call that follows its model: `torch.ops.mnv2.run_plan`.

Each call of an op costs Python and the dispatcher as much as a small block takes, and tensors
between blocks leave the caches. What `plan` does for a model as it is, for images of one size, a
`LiveNetwork` does for every size that comes, with the parameters as they are at each call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..block.fold import BlockLayers
from ..modules.kept import Entries, Kept, State
from ..ops.backends import count
from ..recognizers import Declined, Layer, follow, layers_of
from .arena import arrange
from .lower import check_steps, lower
from .program import Program, encode
from .run_plan import run_plan


@dataclass(frozen=True, eq=False)
class Part:
    """The layers of the calls up to `stop`; no layers where a call must be made by itself."""

    layers: tuple[Layer, ...]
    stop: int


class LiveNetwork:
    """Calls that run one after the other, as many of them as possible as one program.

    Subclasses say what runs.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._kept = Kept(module)

    def calls(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """What runs now: modules inside of `module`, or functions that use its parameters."""
        raise NotImplementedError

    def is_in_mode(self, training: bool) -> bool:
        """Whether `train(training)` of the module would change nothing."""
        return self._kept.is_in_mode(training)

    def look(self) -> State | None:
        """The state of the modules as it is now; None where every call has to be made itself."""
        state = self._kept.look()
        if state.why_blind is not None:
            return None
        return None if torch.is_grad_enabled() and state.requires_grad else state

    def run(self, state: State, x: Tensor, first: int = 0) -> tuple[Tensor, int] | None:
        """(result, next call) of some calls from `first` on; None where that one has to be made.

        x (N, C, H, W), of which `is_plain_call` is true.
        """
        kept = state.of_weights()
        key = (first, x.shape[1:], x.dtype)
        found = kept.get(key) or kept.get((first, x.shape, x.dtype))
        if found is None:
            part, is_sized = self._known_part(state, x.shape, first)
            found = self._program(kept, part, x), part.stop
            kept.keep((first, x.shape, x.dtype) if is_sized else key, found)
        program, stop = found
        if program is None:
            return None
        count("network")
        with torch._C._AutoDispatchBelowAutograd():
            return run_plan(x, program.weights, program.integers, program.bounds), stop

    def part(self, x_shape: Sequence[int], first: int = 0) -> tuple[Part, bool]:
        """The calls from `first` on that are one program, and whether that is so for all shapes."""
        calls = self.calls()[first:]
        if not _asked_for(self.module) <= {None, "cpu"}:
            return Part((), first), False
        try:
            trace, _ = follow(self.module, x_shape, calls)
        except Declined:
            return Part((), first), False
        for stop in range(len(trace.outputs), 0, -1):
            try:
                layers = tuple(layers_of(trace, stop))
                check_steps(layers)
            except Declined:
                continue
            blocks = sum(isinstance(layer, BlockLayers) for layer in layers)
            if blocks > 0 and len(layers) > 1:
                return Part(layers, first + stop), trace.is_sized
        return Part((), first), trace.is_sized

    def _known_part(self, state: State, shape: torch.Size, first: int) -> tuple[Part, bool]:
        readings = state.readings
        for key, is_sized in ((first, False), ((first, shape), True)):
            part = readings.get(key)
            if part is not None:
                return part, is_sized
        part, is_sized = self.part(shape, first)
        readings.keep((first, shape) if is_sized else first, part)
        return part, is_sized

    def _program(self, kept: Entries, part: Part, x: Tensor) -> Program | None:
        if not part.layers:
            return None
        steps = kept.get(part)
        if steps is None:
            steps = lower(part.layers)
            kept.keep(part, steps)
        shape = tuple(x.shape[1:])
        try:
            placed, arena = arrange(steps, shape)
        except ValueError:
            return None  # The layers themselves say what is wrong with x.
        program = encode(placed, shape, arena)
        return program if _fits(program, x) else None


def _asked_for(module: nn.Module) -> set[str | None]:
    """The backends that the blocks inside were told to run on."""
    # Asked of the class: a user's module may answer for names that it has not.
    fused = (inner for inner in module.modules() if hasattr(type(inner), "fused_blocks"))
    return {block.backend for inner in fused for block in inner.fused_blocks}


def _fits(program: Program, x: Tensor) -> bool:
    weights = [w for w in program.weights if w is not None]
    biases = (x.dtype, torch.float32)
    return all(
        w.device.type == "cpu" and (w.dtype == x.dtype or (w.dim() == 1 and w.dtype in biases))
        for w in weights
    )
