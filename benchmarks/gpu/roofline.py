"""Floors of the blocks and of MobileNetV2 on a GPU, by arithmetic.

`python -m benchmarks.gpu.roofline` prints them.

The floor of a kernel is the longest of three times, each at a given rate: its bytes, the FLOPs of
its 1x1 convolutions on tensor cores, its depthwise ones on ordinary cores. Kernels that wait
for each other do not overlap, so a sequence takes the sum. Halo, launches and caches count nothing:
what fits in L2 may be read faster than its floor says.
"""

import argparse
from typing import NamedTuple

from mnv2_kernels.block.config import (
    LAST_CHANNELS,
    BlockConfig,
    make_divisible,
    mobilenet_v2_block_inputs,
)
from mnv2_kernels.block.cost import EXECUTIONS, Execution, operators, tensor_bytes

from ..markdown import markdown

CLASSES = 1000


class Rates(NamedTuple):
    """What a GPU does in a second: bytes copied (read + written), FLOPs by kind of core.

    The defaults are an H200's: copy and matrix product as measured, packed fp16 arithmetic by the
    vendor's figure (67e12 for float32).
    """

    bandwidth: float = 4.3e12
    tensor: float = 790e12
    core: float = 134e12


class Pass(NamedTuple):
    """One kernel: bytes that it reads and writes, FLOPs on tensor cores and on ordinary ones."""

    bytes: int
    tensor_flops: int = 0
    core_flops: int = 0


def times(kernel: Pass, rates: Rates) -> dict[str, float]:
    """Seconds that each resource is busy."""
    return {
        "bytes": kernel.bytes / rates.bandwidth,
        "tensor": kernel.tensor_flops / rates.tensor,
        "depthwise": kernel.core_flops / rates.core,
    }


def floor(kernels: list[Pass], rates: Rates) -> float:
    """Seconds below which no run of these kernels one after another can take."""
    return sum(max(times(kernel, rates).values()) for kernel in kernels)


def limit(kernel: Pass, rates: Rates) -> str:
    """Which resource sets the floor: bytes, tensor or depthwise."""
    busy = times(kernel, rates)
    return max(busy, key=busy.__getitem__)


def block_passes(
    block: BlockConfig, size: int, *, execution: Execution, batch: int = 1, itemsize: int = 2
) -> list[Pass]:
    """The kernels of a block on `batch` inputs of size x size.

    Args:
        execution: as in `mnv2_kernels.block.cost`: one kernel, three with folded batch norm, or
            one for every layer.
        itemsize: bytes an element, 2 for half precision; biases and batch norms are float32.
    """
    sizes = tensor_bytes(block, size, size, batch=batch, itemsize=itemsize)._asdict()
    elements = {name: nbytes // itemsize for name, nbytes in sizes.items()}
    tensor = {
        "expanded": 2 * block.in_channels * elements["expanded"],
        "y": 2 * block.out_channels * elements["depthwise"],
    }
    core = {"depthwise": 2 * block.kernel_size**2 * elements["depthwise"]}
    passes = []
    for operator in operators(block, execution=execution, itemsize=itemsize):
        moved = sum(sizes[name] for name in (*operator.reads, operator.writes)) + operator.weights
        if execution == "fused":
            passes.append(Pass(moved, sum(tensor.values()), sum(core.values())))
            continue
        # A convolution is what reads another tensor than it writes, and not the residual's sum.
        result = operator.writes
        convolves = result not in operator.reads
        flops = (tensor.get(result, 0), core.get(result, 0)) if convolves else (0, 0)
        passes.append(Pass(moved, *flops))
    return passes


def end_passes(
    width_mult: float = 1.0, resolution: int = 224, *, batch: int = 1, itemsize: int = 2
) -> list[Pass]:
    """Stem, last convolution with the mean in its epilogue, classifier: a kernel each.

    The same for every execution, so that what is no block dilutes the speed-up of a
    network.
    """
    inputs = list(mobilenet_v2_block_inputs(width_mult, resolution))
    first, size = inputs[0]
    block, last_size = inputs[-1]
    stem, last = first.in_channels, make_divisible(LAST_CHANNELS * max(1.0, width_mult))
    head_pixels = block.output_hw(last_size, last_size)[0] ** 2

    def kernel(read: int, written: int, weights: int, channels: int, multiply_adds: int) -> Pass:
        moved = itemsize * (batch * (read + written) + weights) + 4 * channels
        return Pass(moved, 2 * batch * multiply_adds)

    image, features = 3 * resolution**2, head_pixels * block.out_channels
    return [
        kernel(image, stem * size**2, 27 * stem, stem, 27 * stem * size**2),
        kernel(features, last, block.out_channels * last, last, features * last),
        kernel(last, CLASSES, last * CLASSES, CLASSES, last * CLASSES),
    ]


def network_passes(
    width_mult: float = 1.0,
    resolution: int = 224,
    *,
    execution: Execution,
    batch: int = 1,
    itemsize: int = 2,
) -> list[Pass]:
    """The kernels of MobileNetV2: of the 17 blocks and of both ends."""
    kwargs = {"batch": batch, "itemsize": itemsize}
    passes = end_passes(width_mult, resolution, **kwargs)
    for block, size in mobilenet_v2_block_inputs(width_mult, resolution):
        passes += block_passes(block, size, execution=execution, **kwargs)
    return passes


def block_table(rates: Rates, *, batch: int, itemsize: int = 2) -> str:
    """Markdown: bytes and floors of the 17 blocks."""
    body = []
    for number, (block, size) in enumerate(mobilenet_v2_block_inputs(), 1):
        kernels = {
            execution: block_passes(
                block, size, execution=execution, batch=batch, itemsize=itemsize
            )
            for execution in EXECUTIONS
        }
        floors = {name: floor(passes, rates) for name, passes in kernels.items()}
        cells = [str(number), block.name, f"{size}x{size}"]
        for name in reversed(EXECUTIONS):
            megabytes = sum(kernel.bytes for kernel in kernels[name]) / 1e6
            cells += [f"{megabytes:.2f}", f"{floors[name] * 1e6:.3f}"]
        cells += [limit(kernels["fused"][0], rates), f"{floors['folded'] / floors['fused']:.1f}x"]
        body.append(cells)
    head = ["block", "in x hidden x out", "input"]
    for name in reversed(EXECUTIONS):
        head += [f"{name} MB", f"{name} us"]
    return markdown([*head, "limit", "folded over fused"], body)


def network_table(rates: Rates, batches: list[int], *, itemsize: int = 2) -> str:
    """Markdown: floors of the whole network by batch, and images a second at them."""
    body = []
    for batch in batches:
        floors = {
            name: floor(network_passes(execution=name, batch=batch, itemsize=itemsize), rates)
            for name in reversed(EXECUTIONS)
        }
        cells = [str(batch)]
        for seconds in floors.values():
            cells += [f"{seconds * 1e6:.2f}", f"{batch / seconds:.0f}"]
        body.append([*cells, f"{floors['folded'] / floors['fused']:.2f}x"])
    head = ["batch"]
    for name in reversed(EXECUTIONS):
        head += [f"{name} us", f"{name} img/s"]
    return markdown([*head, "folded over fused"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--itemsize", type=int, default=2, help="bytes an element")
    parser.add_argument("--bandwidth", type=float, default=Rates().bandwidth, help="bytes/s")
    parser.add_argument("--tensor", type=float, default=Rates().tensor, help="FLOP/s of products")
    parser.add_argument("--core", type=float, default=Rates().core, help="FLOP/s of the depthwise")
    options = parser.parse_args()
    rates = Rates(options.bandwidth, options.tensor, options.core)
    for batch in options.batches:
        print(f"Floors of the blocks, batch {batch}\n")
        print(block_table(rates, batch=batch, itemsize=options.itemsize), end="\n\n")
    print("Floors of the network\n")
    print(network_table(rates, options.batches, itemsize=options.itemsize))


if __name__ == "__main__":
    main()
