"""Bytes that a network holds step by step, by arithmetic: run layer by layer, block by block, or
as a plan. The steps are a plan's (`program.py`); weights do not count.
"""

import math
from collections.abc import Sequence

from ..block import cost
from .program import Block, Linear, Pointwise, Pool, Shape, Stem, Step, shapes


def live_bytes(
    steps: Sequence[Step],
    shape: Shape,
    *,
    execution: cost.Execution,
    batch: int = 1,
    itemsize: int = 4,
) -> list[int]:
    """Most bytes of activations alive in each step of a network run layer by layer or fused.

    `shape` (C, H, W) is an image's; the images are held from first to last, and a step holds
    its input and its result. A fused block holds the kernel's scratch too, which is not counted.
    Batch norm of the stem and of the last convolution is an operator of its own in "eager".
    """
    pixel_bytes = batch * itemsize
    image = pixel_bytes * math.prod(shape)
    copies = 2 if execution == "eager" else 1
    found, x_shape = [], shape
    for number, (step, y_shape) in enumerate(zip(steps, shapes(steps, shape), strict=True)):
        x, y = pixel_bytes * math.prod(x_shape), pixel_bytes * math.prod(y_shape)
        match step.layer:
            case Block(config):
                height, width = x_shape[1:]
                held = cost.peak_bytes(
                    config, height, width, execution=execution, batch=batch, itemsize=itemsize
                )
            case Stem() | Pointwise():
                held = x + copies * y
            case Pool() as pool if pool.weight is not None:
                held = x + copies * pixel_bytes * pool.out_channels * math.prod(x_shape[1:])
            case Pool() | Linear():
                held = x + y
        found.append(held + (image if number else 0))
        x_shape = y_shape
    return found


def paper_bound(steps: Sequence[Step], shape: Shape, *, batch: int = 1, itemsize: int = 4) -> int:
    """M(G) of the paper's section 5.1, in bytes, where nothing but the blocks' inner tensors and
    the tensor before the average is split, into single channels, and the images are read once.
    The channels of a block with a squeeze-excite have to be computed twice for that.
    """
    operators, x_shape = [], shape
    for step, y_shape in zip(steps, shapes(steps, shape), strict=True):
        x, y = (batch * itemsize * math.prod(s) for s in (x_shape, y_shape))
        match step.layer:
            case Block(config):
                height, width = x_shape[1:]
                groups = config.hidden_channels
                operator = cost.split_block(
                    config, height, width, groups=groups, batch=batch, itemsize=itemsize
                )
            case Pool() as pool if pool.weight is not None:
                operator = cost.ChainOperator(x, y, itemsize * math.prod(x_shape[1:]))
            case _:
                operator = cost.ChainOperator(x, y)
        operators.append(operator)
        x_shape = y_shape
    return cost.chain_peak_bytes(operators)


def planned_bytes(
    *,
    image: int,
    result: int,
    arena: int,
    lines_of_one: int,
    lines_of_all: int,
    features: int = 0,
    batch: int = 1,
    threads: int = 1,
) -> int:
    """Bytes that a plan holds on the CPU from first to last: its input, its result, one block.

    Threads take whole images while there are enough for all of them, each with an arena and line
    buffers (`lines_of_one`) of its own; the rest are run one by one by all threads, on one arena
    and `lines_of_all`. One block serves both. The classifier is computed for up to 8 images at
    once where their inputs of it are kept that long.

    Args:
        image, result: bytes of one image's input and result.
        arena: bytes of the tensors between the steps.
        lines_of_one, lines_of_all: line buffers and scratch of one thread, and of `threads`.
        features: the classifier's input of one image, in whole cache lines; 0 where it is computed
            image by image.
    """
    whole = batch - batch % threads if threads > 1 else 0
    own = threads * (arena + lines_of_one + _kept(whole // threads, features)) if whole else 0
    rest = batch - whole
    shared = arena + lines_of_all + _kept(rest, features) if rest else 0
    return batch * (image + result) + max(own, shared)


def _kept(images: int, features: int) -> int:
    """Bytes of the classifier's inputs that wait: kImagesAtOnce in csrc/torch/ops_plan.cpp."""
    return min(images, 8) * features if images > 1 else 0


def planned_in_use(
    steps: Sequence[Step],
    shape: Shape,
    line_bytes: Sequence[int],
    *,
    itemsize: int = 4,
) -> list[int]:
    """Bytes of the tensors that each step of a plan uses, of one image; its image included.

    Steps that stream into one another run at once: each of them uses the input of the first, the
    result of the last and the lines between. A result in the place of its input counts once. A
    block with a squeeze-excite uses its depthwise result too, float32.

    Args:
        line_bytes: by step, of the rows of a streamed result that are in memory at a time.
    """
    sizes = [itemsize * math.prod(s) for s in (shape, *shapes(steps, shape))]
    found, begin = [], 0
    while begin < len(steps):
        end = begin
        while steps[end].streams:
            end += 1
        source = begin - 1
        in_place = source >= 0 and begin == end < len(steps) - 1
        layer = steps[begin].layer
        if isinstance(layer, Block) and layer.config.squeeze_channels:
            in_place = in_place and sizes[begin] >= sizes[end + 1]
            kept = 4 * sizes[end + 1] // itemsize // layer.config.out_channels
            kept *= layer.config.hidden_channels
        else:
            in_place = in_place and steps[source].offset == steps[end].offset
            in_place = in_place and sizes[begin] == sizes[end + 1]
            kept = 0
        used = kept if in_place else kept + sizes[end + 1]
        used += sum(line_bytes[begin:end]) + (sizes[begin] if begin else 0)
        found += [sizes[0] + used] * (end + 1 - begin)
        begin = end + 1
    return found
