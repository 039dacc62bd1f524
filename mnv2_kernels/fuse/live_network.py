"""Consecutive layers of a chain as one call: `torch.ops.mnv2.run_plan` over blocks and the
convolutions beside them.

Each call of an op costs Python and the dispatcher as much as a small block takes, and tensors
between blocks leave the caches. What `plan` does for a whole model of one size, a `Joined` does for
a part of one, for every size that comes, with the parameters as they are at each call.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter, is_not
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.nn.modules import module as hooks_of_all
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..modules.snapshot import Remembered
from ..modules.tracing import is_observed
from ..modules.unchanged import Unchanged
from ..modules.watched import Folded, Watched
from ..network.arena import arrange
from ..network.program import Layer, Pointwise, Pool, Program, Shape, encode
from ..network.run_plan import run_plan
from ..ops.backends import choose
from ..ops.extension import missing
from ..recognizers import Declined
from .links import Link

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PROGRAMS = 16
_is_training = attrgetter("training")


class _Known(NamedTuple):
    """Weights, by what would change with them, and programs of them by size and dtype.

    A program is None where the layers have to run themselves.
    """

    state: list
    kept: list[Folded | None]
    folded: list
    programs: OrderedDict[tuple, Program | None]


class _Seen(NamedTuple):
    """Of layers that need not run one by one."""

    known: _Known
    requires_grad: bool


class Joined:
    """Links that follow one another, two at least, run as one program wherever that is exact.

    `around` are the modules that they were found in and what else is called there, as they were
    then: one that has changed, or that somebody listens to, has to be called itself.
    """

    def __init__(self, links: Sequence[Link], around: Sequence[Unchanged] = ()):
        self._links = tuple(links)
        self._around = [*around, *(Unchanged(link.module) for link in links)]
        self._watched = Watched.together([link.watched for link in links])
        self._modal = [module for link in links for module in link.modal]
        self._known: _Known | None = None
        self._remembered = Remembered()

    def run(self, x: Tensor) -> Tensor | None:
        """What the layers make of x (N, C, H, W); None where they have to run one by one.

        `may_join(x)` is true.
        """
        seen = self._remembered.get()
        if seen is None:
            known = self._look()
        else:
            known = None if seen.requires_grad and torch.is_grad_enabled() else seen.known
        program = None if known is None else self._program_for(x, known)
        if program is None:
            return None
        with torch._C._AutoDispatchBelowAutograd():
            return run_plan(x, program.weights, program.integers, program.bounds)

    def _look(self) -> _Known | None:
        """The weights as they are now; None where the layers have to run one by one."""
        before, known = self._known, self._look_closely()
        if known is not None and known is before:
            self._remembered.offer(self._all_modules, self._seen)
        return known

    def _seen(self) -> _Seen | None:
        known = self._look_closely()
        requires_grad = any(t.requires_grad for t in self._watched.tensors())
        return None if known is None else _Seen(known, requires_grad)

    def _look_closely(self) -> _Known | None:
        if (
            not all(place.holds() for place in self._around)
            or any(map(_is_training, self._modal))
            or not all(link.may_run() for link in self._links)
            or self._watched.why_touched() is not None
        ):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._watched.tensors()):
            return None
        return self._current()

    def _all_modules(self) -> set[nn.Module]:
        """All that is looked at."""
        return {module for place in self._around for module in place.module.modules()}

    def _program_for(self, x: Tensor, known: _Known) -> Program | None:
        programs = known.programs
        key = x.shape[1:], x.dtype
        with suppress(KeyError):
            return programs[key]
        program = self._encode(known.folded, tuple(x.shape[1:]))
        programs[key] = found = program if program and _fits(program, x) else None
        if len(programs) > _MOST_PROGRAMS:
            programs.popitem(last=False)
        return found

    def _current(self) -> _Known | None:
        """The weights as they are now."""
        known = self._known  # Read once: another thread may find other weights.
        # Before anything is folded: what changes meanwhile is seen by the next call.
        state = self._watched.state()
        if state is None:
            return None
        kept = [link.kept() for link in self._links]
        if known and state == known.state and not any(map(is_not, kept, known.kept)):
            return known
        tensors = self._watched.tensors()
        # Subclasses may do more than compute.
        if not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
            return None
        if self._watched.has_other_shapes():
            return None
        folded = [link.folded() for link in self._links]
        if any(f is None for f in folded):
            return None
        same = known is not None and not any(map(is_not, folded, known.folded))
        programs = known.programs if same else OrderedDict()
        self._known = _Known(state, [link.kept() for link in self._links], folded, programs)
        return self._known

    def _encode(self, folded: list, shape: Shape) -> Program | None:
        layers: list[tuple[str, Layer]] = []
        of_x = shape
        try:
            for link, step in zip(self._links, folded, strict=True):
                layer = link.layer(step, shape)
                if isinstance(layer, Pool) and layers and isinstance(layers[-1][1], Pointwise):
                    layer = Pool(*vars(layers.pop()[1]).values())
                layers.append(("", layer))
                shape = layer.output_shape(shape)
            steps, arena = arrange(layers, of_x)
        except (Declined, ValueError):
            return None  # The layers one by one say what is wrong with x.
        return encode(steps, of_x, arena)


def _fits(program: Program, x: Tensor) -> bool:
    weights = [w for w in program.weights if w is not None]
    biases = (x.dtype, torch.float32)
    return all(
        w.device.type == "cpu" and (w.dtype == x.dtype or (w.dim() == 1 and w.dtype in biases))
        for w in weights
    )


def may_join(x: Tensor) -> bool:
    """Whether nobody looks at single layers, and x is one that the kernels take.

    While a profiler records, layers run one by one, each in a range of its own.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.dim() == 4
        and x.dtype in _DTYPES
        and missing is None
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not profiler._is_profiler_enabled
        and not torch._C._are_functorch_transforms_active()
        and not is_observed()
        and not _has_function_modes()
        and not _has_global_hooks()
        and choose(None, x) == "cpu"
    )


def _has_function_modes() -> bool:
    """Whether somebody sees every function of torch; a default device does not look."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return not all(isinstance(m, DeviceContext) for m in _get_current_function_mode_stack())


def _has_global_hooks() -> bool:
    return bool(
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    )
