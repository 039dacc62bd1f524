"""What a block costs by arithmetic: multiply-adds, bytes moved, bytes alive. Nothing is measured.

A block can run in three ways, and every function that depends on it takes `execution`:

    eager    layer by layer; batch norm is an operator of its own, ReLU6 works in place
    folded   layer by layer with batch norm in the convolutions, ReLU6 and residual in their
             epilogues: the best that can be done while the expanded tensor is in memory
    fused    one operator; expansion and depthwise output are its scratch

Of a squeeze-excite, the numbers that are one a channel count as nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from .config import (
    LAST_CHANNELS,
    STEM_CHANNELS,
    BlockConfig,
    make_divisible,
    mobilenet_v2_block_inputs,
    output_size,
)

Execution = Literal["eager", "folded", "fused"]
EXECUTIONS: tuple[Execution, ...] = ("eager", "folded", "fused")


class TensorBytes(NamedTuple):
    """Bytes of the tensors of a block: input, expansion (0 at t = 1), depthwise output, result.

    A dense block has no expansion; its depthwise output is that of the convolution in its place.
    """

    x: int
    expanded: int
    depthwise: int
    y: int


class Operator(NamedTuple):
    """One pass over memory: the tensors it reads and writes, by name, and bytes of its weights."""

    reads: tuple[str, ...]
    writes: str
    weights: int = 0
    in_place: bool = False


def multiply_adds(block: BlockConfig, height: int, width: int, *, batch: int = 1) -> int:
    """Multiply-adds of the convolutions on an input of height x width, as the paper counts.

    Those of a squeeze-excite, on the means, are among them.
    """
    height_out, width_out = block.output_hw(height, width)
    expansion = height * width * block.in_channels if block.expansion else 0
    per_output = _taps(block) + block.out_channels
    of_a_channel = expansion + height_out * width_out * per_output + 2 * block.squeeze_channels
    return batch * block.hidden_channels * of_a_channel


def _taps(block: BlockConfig) -> int:
    """Weights of a hidden channel of the depthwise, or of the dense convolution in its place."""
    return block.kernel_size**2 * (block.in_channels if block.dense else 1)


def flops(block: BlockConfig, height: int, width: int, *, batch: int = 1) -> int:
    """Two per multiply-add; halo that a kernel computes twice is not counted twice."""
    return 2 * multiply_adds(block, height, width, batch=batch)


def parameters(block: BlockConfig) -> int:
    """Trainable parameters with batch norm: no convolution has a bias, each norm has two rows.

    The two layers of a squeeze-excite have biases and no norms.
    """
    hidden, squeezed = block.hidden_channels, block.squeeze_channels
    expansion = hidden * (block.in_channels + 2) if block.expansion else 0
    depthwise = hidden * (_taps(block) + 2)
    gate = squeezed * (hidden + 1) + hidden * (squeezed + 1) if squeezed else 0
    return expansion + depthwise + gate + block.out_channels * (hidden + 2)


def tensor_bytes(
    block: BlockConfig, height: int, width: int, *, batch: int = 1, itemsize: int = 4
) -> TensorBytes:
    """Sizes of the block's tensors; `itemsize` is bytes an element, 4 for float32."""
    height_out, width_out = block.output_hw(height, width)
    pixels = batch * itemsize * height * width
    pixels_out = batch * itemsize * height_out * width_out
    return TensorBytes(
        x=pixels * block.in_channels,
        expanded=pixels * block.hidden_channels if block.expansion else 0,
        depthwise=pixels_out * block.hidden_channels,
        y=pixels_out * block.out_channels,
    )


def operators(block: BlockConfig, *, execution: Execution, itemsize: int = 4) -> Iterator[Operator]:
    """The passes over memory of one forward, in order, in names of `TensorBytes`.

    Biases and batch norms are float32 at least.

    Raises:
        ValueError: there is no such execution.
    """
    if execution not in EXECUTIONS:
        names = ", ".join(EXECUTIONS)
        raise ValueError(f"cost: execution must be one of {names}, got {execution!r}")
    hidden, out_channels = block.hidden_channels, block.out_channels
    stages = [
        ("depthwise", hidden, _taps(block) * hidden),
        ("y", out_channels, hidden * out_channels),
    ]
    if block.expansion:
        stages.insert(0, ("expanded", hidden, block.in_channels * hidden))
    vector = max(4, itemsize)
    folded_weights = [itemsize * n + vector * channels for _, channels, n in stages]
    squeezed = block.squeeze_channels
    gate_weights = itemsize * 2 * hidden * squeezed + vector * (squeezed + hidden)
    if execution == "fused":
        yield Operator(("x",), "y", sum(folded_weights) + (gate_weights if squeezed else 0))
        return
    source = "x"
    for (result, channels, n), folded in zip(stages, folded_weights, strict=True):
        if execution == "folded":
            adds_residual = result == "y" and block.residual
            yield Operator((source, "x") if adds_residual else (source,), result, folded)
        else:
            yield Operator((source,), result, itemsize * n)
            yield Operator((result,), result, 4 * vector * channels)
            if result != "y":
                yield Operator((result,), result, in_place=True)
        if result == "depthwise" and squeezed:
            # Read for the means, then for the product, which is a tensor of its own.
            yield Operator(("depthwise", "depthwise"), "depthwise", gate_weights)
        source = result
    if execution == "eager" and block.residual:
        yield Operator(("x", "y"), "y")


def bytes_moved(
    block: BlockConfig,
    height: int,
    width: int,
    *,
    execution: Execution,
    batch: int = 1,
    itemsize: int = 4,
) -> int:
    """Bytes read and written where every operator streams its tensors and weights once."""
    sizes = tensor_bytes(block, height, width, batch=batch, itemsize=itemsize)._asdict()
    return sum(
        sum(sizes[name] for name in (*operator.reads, operator.writes)) + operator.weights
        for operator in operators(block, execution=execution, itemsize=itemsize)
    )


def peak_bytes(
    block: BlockConfig,
    height: int,
    width: int,
    *,
    execution: Execution,
    batch: int = 1,
    itemsize: int = 4,
    scratch: int = 0,
) -> int:
    """Most bytes of activations alive at once, x and y included.

    M(G) of the paper's section 5.1, the largest operator counting its inputs and its output, with
    x held from first to last. For the layer-wise executions that is a lower bound: modules in
    modules hold a tensor beyond its last use. `scratch` is memory of the fused operator itself.
    """
    sizes = tensor_bytes(block, height, width, batch=batch, itemsize=itemsize)._asdict()

    def live(operator: Operator) -> int:
        reads = sum(sizes[name] for name in {*operator.reads} - {"x"})
        return sizes["x"] + reads + (0 if operator.in_place else sizes[operator.writes])

    passes = operators(block, execution=execution, itemsize=itemsize)
    return max(map(live, passes)) + (scratch if execution == "fused" else 0)


class ChainOperator(NamedTuple):
    """What an operator of a chain holds: bytes of its inputs, of its result, of its own scratch."""

    inputs: int
    result: int
    scratch: int = 0


def chain_peak_bytes(operators: Iterable[ChainOperator]) -> int:
    """M(G) of the paper's section 5.1 for a chain: the operator that holds most, in bytes.

    In a chain there is one order only, and a tensor is there while the operator that makes it and
    the one that reads it run: M(G) = max over operators of inputs + result + scratch.

    Raises:
        ValueError: there is no operator.
    """
    held = [sum(operator) for operator in operators]
    if not held:
        raise ValueError("chain_peak_bytes: operators must be at least one, got none")
    return max(held)


def split_block(
    block: BlockConfig, height: int, width: int, *, groups: int, batch: int = 1, itemsize: int = 4
) -> ChainOperator:
    """The block as one operator whose hidden channels are computed in `groups` parts (section 5.1).

    F(x) = sum over i of (A_i . N . B_i)(x): the result grows part by part, and of the expanded and
    the depthwise tensor only the largest part of one image is there, which is the scratch. The
    multiply-adds stay the same.

    Raises:
        ValueError: groups is not from 1 to the number of hidden channels.
    """
    if not 1 <= groups <= block.hidden_channels:
        raise ValueError(
            f"split_block: groups must be from 1 to {block.hidden_channels}, the number of hidden"
            f" channels, got {groups}"
        )
    sizes = tensor_bytes(block, height, width, batch=batch, itemsize=itemsize)
    largest = -(-block.hidden_channels // groups)
    one_image = (sizes.expanded + sizes.depthwise) // batch
    return ChainOperator(sizes.x, sizes.y, one_image * largest // block.hidden_channels)


def network_multiply_adds(
    width_mult: float = 1.0, resolution: int = 224, *, batch: int = 1, num_classes: int = 1000
) -> int:
    """Multiply-adds of MobileNetV2 (Table 2): stem, 17 blocks, last convolution, classifier."""
    stem, last = _ends(width_mult)
    blocks = list(mobilenet_v2_block_inputs(width_mult, resolution))
    size = output_size(resolution, 3, 2, 1, 1)
    block, block_size = blocks[-1]
    head_pixels = block_size**2
    return batch * (
        27 * stem * size**2
        + sum(multiply_adds(b, n, n) for b, n in blocks)
        + head_pixels * block.out_channels * last
        + last * num_classes
    )


def network_parameters(width_mult: float = 1.0, *, num_classes: int = 1000) -> int:
    """Trainable parameters of MobileNetV2 with batch norm."""
    stem, last = _ends(width_mult)
    blocks = [block for block, _ in mobilenet_v2_block_inputs(width_mult)]
    return (
        stem * (27 + 2)
        + sum(map(parameters, blocks))
        + last * (blocks[-1].out_channels + 2)
        + (last + 1) * num_classes
    )


def network_peak_bytes(
    width_mult: float = 1.0,
    resolution: int = 224,
    *,
    execution: Execution,
    batch: int = 1,
    itemsize: int = 4,
) -> int:
    """Most bytes of activations alive at once in a network run block by block, image included.

    The image is held from first to last; stem and last convolution run as layers do, with their
    batch norm in place of an operator where `execution` is eager.
    """
    stem, last = _ends(width_mult)
    image = batch * itemsize * 3 * resolution**2
    size = output_size(resolution, 3, 2, 1, 1)
    blocks = list(mobilenet_v2_block_inputs(width_mult, resolution))
    kwargs = {"execution": execution, "batch": batch, "itemsize": itemsize}
    copies = 2 if execution == "eager" else 1
    stem_bytes = copies * batch * itemsize * stem * size**2
    block, block_size = blocks[-1]
    last_bytes = batch * itemsize * block_size**2 * (block.out_channels + copies * last)
    peaks = [peak_bytes(b, n, n, **kwargs) for b, n in blocks]
    return image + max(stem_bytes, *peaks, last_bytes)


def _ends(width_mult: float) -> tuple[int, int]:
    """Channels of the stem and of the last convolution, which widens only above 1."""
    stem = make_divisible(STEM_CHANNELS * width_mult)
    return stem, make_divisible(LAST_CHANNELS * max(1.0, width_mult))
