"""Consecutive layers of a chain as one call: `torch.ops.mnv2.run_plan` over blocks and the
convolutions beside them.

Each call of an op costs Python and the dispatcher as much as a small block takes, and tensors
between blocks leave the caches. What `plan` does for a whole model of one size, a `Joined` does for
a part of one, for every size that comes, with the parameters as they are at each call.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from operator import is_not

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.nn.modules import module as hooks_of_all

from .arena import arrange
from .backends import choose
from .block import Padding
from .convolutions import pointwise, stem
from .extension import missing
from .fold import ConvNorm, FoldedWeights, same_padding_by_two
from .fused import FusedModule, why_overridden
from .plan_op import run_plan
from .program import Block, Layer, Pointwise, Program, Shape, encode
from .recognizers import Declined
from .recognizers.layers import check_untouched, flatten, has_hooks, is_sequential, read_stages
from .tracing import is_observed
from .watched import Folded, Watched, fold_once

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PROGRAMS = 16
_ANY_SIZE = (1, 2, 2)  # Paddings that depend on the size come with the size.


class BlockLink:
    """A fused block among the layers."""

    is_stem = False

    def __init__(self, block: FusedModule):
        self.block = block

    def is_ready(self) -> bool:
        """Whether the block would run its kernel on the CPU."""
        block = self.block
        return (
            block.backend in (None, "cpu")
            and _is_called_as_it_is(block)
            and block._why_layers_needed() is None
        )

    def tensors(self) -> list[Tensor]:
        return self.block._watched.tensors()

    def folded(self) -> tuple | None:
        """The op's arguments, the same tuple while they stay the same; None where they may not."""
        arguments = self.block.folded_arguments()
        cached = self.block._folded
        return arguments if cached is not None and cached.value is arguments else None

    def layer(self, arguments: tuple, shape: Shape) -> Layer:
        """The step for images of `shape`."""
        layers = self.block.block_layers.at(*shape[1:])
        return Block(layers.config, FoldedWeights(*arguments[:6], *arguments[-3:]))


class ConvolutionLink:
    """A convolution with its norm and clip: the stem of a network, or a 1x1 one."""

    def __init__(self, module: nn.Module, stage: ConvNorm, padding: Padding | None):
        self._module, self._stage, self._padding = module, stage, padding
        self._watched = Watched(module, [stage])
        self._folded: Folded | None = None

    @property
    def is_stem(self) -> bool:
        """Whether it can only be the first of a program."""
        return self._stage.conv.kernel_size != (1, 1)

    def is_ready(self) -> bool:
        """Whether nothing but its values matters of the convolution."""
        return (
            _is_called_as_it_is(self._module)
            and not any(norm.training for norm in self._watched.batch_norms)
            and self._watched.why_changed() is None
        )

    def tensors(self) -> list[Tensor]:
        return self._watched.tensors()

    def folded(self) -> Layer | None:
        """The step for one size, the same object while its weights stay the same; None where they
        may not.
        """
        self._folded = fold_once(self._watched, self._folded, self.fold)
        return None if self._folded is None else self._folded.value

    def fold(self) -> Layer:
        """The step; Declined where the convolution is of another kind."""
        if self.is_stem:
            return stem(self._stage, "the convolution", self._padding, _ANY_SIZE)
        return pointwise(self._stage, "the convolution", self._padding)

    def layer(self, folded: Layer, shape: Shape) -> Layer:
        """The step for images of `shape`."""
        if self._padding is not None or isinstance(folded, Pointwise):
            return folded
        return replace(folded, padding=same_padding_by_two(3, *shape[1:]))


Link = BlockLink | ConvolutionLink


class Joined:
    """Links that follow one another, two at least, run as one program wherever that is exact.

    `inside` are the containers that they were found in: a container with hooks, or with other
    children by now, has to be called itself.
    """

    def __init__(self, links: Sequence[Link], inside: Sequence[nn.Module] = ()):
        self._links = tuple(links)
        self._inside = [(c, list(c._modules.values())) for c in inside]
        # Weights, and programs of them by size and dtype; None where the layers have to run
        # themselves.
        self._known: tuple[list, OrderedDict[tuple, Program | None]] = [], OrderedDict()

    def run(self, x: Tensor) -> Tensor | None:
        """What the layers make of x (N, C, H, W); None where they have to run one by one.

        `may_join(x)` is true.
        """
        for container, children in self._inside:
            if list(container._modules.values()) != children or not _is_called_as_it_is(container):
                return None
        if not all(link.is_ready() for link in self._links):
            return None
        if torch.is_grad_enabled() and any(
            t.requires_grad for link in self._links for t in link.tensors()
        ):
            return None
        program = self._program_for(x)
        if program is None:
            return None
        with torch._C._AutoDispatchBelowAutograd():
            return run_plan(x, program.weights, program.integers, program.bounds)

    def _program_for(self, x: Tensor) -> Program | None:
        folded = [link.folded() for link in self._links]
        if any(f is None for f in folded):
            return None
        before, programs = self._known  # Read once: another thread may find other weights.
        if len(before) != len(folded) or any(map(is_not, before, folded)):
            self._known = _, programs = folded, OrderedDict()
        key = x.shape[1:], x.dtype
        with suppress(KeyError):
            return programs[key]
        program = self._encode(folded, tuple(x.shape[1:]))
        fits = program is not None and program.dtype == x.dtype
        programs[key] = found = program if fits and program.device.type == "cpu" else None
        if len(programs) > _MOST_PROGRAMS:
            programs.popitem(last=False)
        return found

    def _encode(self, folded: list, shape: Shape) -> Program | None:
        layers = []
        of_x = shape
        try:
            for link, step in zip(self._links, folded, strict=True):
                layer = link.layer(step, shape)
                layers.append(("", layer))
                shape = layer.output_shape(shape)
            steps, arena = arrange(layers, of_x)
        except (Declined, ValueError):
            return None  # The layers one by one say what is wrong with x.
        return encode(steps, of_x, arena)


def may_join(x: Tensor) -> bool:
    """Whether nobody looks at single layers, and x is one that the kernels take.

    While a profiler records, layers run one by one, each in a range of its own.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in _DTYPES
        and missing is None
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not profiler._is_profiler_enabled
        and not torch._C._are_functorch_transforms_active()
        and not is_observed()
        and not _has_global_hooks()
        and choose(None, x) == "cpu"
    )


def _is_called_as_it_is(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    return not has_hooks(module) and "forward" not in module.__dict__


def _has_global_hooks() -> bool:
    return bool(
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    )


def link_of(module: nn.Module) -> Link | None:
    """The link of a module that is one layer: a fused block, a stem, a 1x1 convolution."""
    if isinstance(module, FusedModule):
        return BlockLink(module) if why_overridden(module) is None else None
    if not (is_sequential(module) or isinstance(module, nn.Conv2d)):
        return None
    try:
        check_untouched(module)
        stages, paddings = read_stages(flatten(module), by_size=True)
        if len(stages) != 1:
            return None
        link = ConvolutionLink(module, stages[0], paddings[0])
        link.fold()
    except Declined:
        return None
    return link
