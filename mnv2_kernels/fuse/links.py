"""The layers that can run together in one call: what each looks at, and its step of a program.

Every link has

    module      called as its class says, or the layers run one by one
    watched     what it takes for granted of the layers inside
    modal       modules that compute something else in training mode
    is_stem     whether it can only be the first of a program
    may_run()   whether it has a step at all, while all that has not changed
    folded()    what its step is made of: the same object while the weights stay the same; None
                where changes cannot be seen
    kept()      what was folded last and not dropped since
    layer()     the step for images of a shape (C, H, W)
"""

from dataclasses import replace

from torch import nn

from ..block.config import NO_CLIP, Padding
from ..block.fold import ConvNorm, FoldedWeights, same_padding_by_two
from ..modules.fused_module import FusedModule, why_overridden
from ..modules.watched import Folded, Watched, fold_once
from ..network.convolutions import pointwise, stem
from ..network.program import Block, Layer, Linear, Pointwise, Pool, Shape
from ..recognizers import Declined
from ..recognizers.layers import check_untouched, flatten, is_sequential, read_stages

_ANY_SIZE = (1, 2, 2)  # Paddings that depend on the size come with the size.


class BlockLink:
    """A fused block."""

    is_stem = False

    def __init__(self, block: FusedModule):
        self.module, self.watched = block, block._watched
        self.modal = [block, *block._watched.batch_norms, *block._watched.drops]

    def may_run(self) -> bool:
        return self.module.backend in (None, "cpu")

    def folded(self) -> tuple | None:
        arguments = self.module.folded_arguments()
        kept = self.kept()
        return arguments if kept is not None and kept.value is arguments else None

    def kept(self) -> Folded | None:
        return self.module._folded

    def layer(self, arguments: tuple, shape: Shape) -> Layer:
        layers = self.module.block_layers.at(*shape[1:])
        return Block(layers.config, FoldedWeights(*arguments[:6], *arguments[-3:]))


class _FoldedStep:
    """A link whose step for one size is what it folds."""

    is_stem = False

    def __init__(self, module: nn.Module, watched: Watched):
        self.module, self.watched = module, watched
        self.modal = watched.batch_norms
        self._folded: Folded | None = None

    def may_run(self) -> bool:
        return True

    def folded(self) -> Layer | None:
        self._folded = fold_once(self.watched, self._folded, self.fold)
        return None if self._folded is None else self._folded.value

    def kept(self) -> Folded | None:
        return self._folded

    def layer(self, step: Layer, shape: Shape) -> Layer:
        return step


class ConvolutionLink(_FoldedStep):
    """A convolution with its norm and clip: the stem of a network, or a 1x1 one.

    `module` has them all inside, or is the convolution.
    """

    def __init__(self, module: nn.Module, stage: ConvNorm, padding: Padding | None):
        super().__init__(module, Watched(module, [stage]))
        self._stage, self._padding = stage, padding

    @property
    def is_stem(self) -> bool:
        return self._stage.conv.kernel_size != (1, 1)

    def fold(self) -> Layer:
        """The step; Declined where the convolution is of another kind."""
        if self.is_stem:
            return stem(self._stage, "the convolution", self._padding, _ANY_SIZE)
        return pointwise(self._stage, "the convolution", self._padding)

    def layer(self, step: Layer, shape: Shape) -> Layer:
        if self._padding is not None or isinstance(step, Pointwise):
            return step
        return replace(step, padding=same_padding_by_two(3, *shape[1:]))


class LinearLink(_FoldedStep):
    """The classifier."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear, Watched(linear, further=[linear]))

    def fold(self) -> Linear:
        linear = self.module
        weight = linear.weight.detach().contiguous()
        bias = None if linear.bias is None else linear.bias.detach().contiguous()
        if bias is not None and bias.dtype == weight.dtype:
            bias = bias.float()
        return Linear(linear.in_features, linear.out_features, weight, bias)


class AverageLink:
    """The mean over all pixels, and its flattening: no module of its own."""

    is_stem = False

    def __init__(self) -> None:
        self.module = nn.Identity()
        self.watched, self.modal = Watched(self.module), []

    def may_run(self) -> bool:
        return True

    def folded(self) -> Layer:
        return _AVERAGE

    def kept(self) -> None:
        return None

    def layer(self, step: Layer, shape: Shape) -> Layer:
        return replace(step, in_channels=shape[0], out_channels=shape[0])


_AVERAGE = Pool(0, 0, None, None, NO_CLIP)
Link = BlockLink | ConvolutionLink | LinearLink | AverageLink


def link_of(module: nn.Module) -> Link | None:
    """The link of a module that is one layer: a fused block, a stem, a 1x1 convolution."""
    if isinstance(module, FusedModule):
        return BlockLink(module) if why_overridden(module) is None else None
    if not (is_sequential(module) or isinstance(module, nn.Conv2d)):
        return None
    try:
        check_untouched(module)
        stages, paddings = read_stages(flatten(module), by_size=True)
    except Declined:
        return None
    return convolution_link(module, stages[0], paddings[0]) if len(stages) == 1 else None


def convolution_link(
    module: nn.Module, stage: ConvNorm, padding: Padding | None
) -> ConvolutionLink | None:
    """The link of a convolution; None where it is no stem and no 1x1 one."""
    link = ConvolutionLink(module, stage, padding)
    try:
        link.fold()
    except Declined:
        return None
    return link
