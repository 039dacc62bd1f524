"""Table 3 of the MobileNetV2 paper (arXiv 1801.04381), computed from the networks' own layers.

The table compares what MobileNetV1, MobileNetV2 and ShuffleNet (2x, g = 3) must hold at every
resolution of a 224x224 image: most channels of a tensor that passes from one operator to the next,
and its bytes at 16 bit. What an operator keeps to itself (the expanded tensor of an inverted
residual, the bottleneck of a ShuffleNet unit) does not count. The printed numbers of both
versions are kept too and, where the layers give other ones, the reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..block.config import LAST_CHANNELS, STEM_CHANNELS, mobilenet_v2_block_inputs

Version = Literal["first", "current"]
VERSIONS: tuple[Version, ...] = ("first", "current")
NETWORKS = ("MobileNetV1", "MobileNetV2", "ShuffleNet")
SIZES = (112, 56, 28, 14, 7, 1)
ITEMSIZE = 2

# (channels, stride) of the depthwise separable layers: arXiv 1704.04861, Table 1.
MOBILENET_V1_LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
# Groups -> output channels of stages 2, 3 and 4 at 1x; repeats of their units: arXiv 1707.01083,
# Table 1. The first convolution has 24 channels at 1x.
SHUFFLENET_STAGES = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
SHUFFLENET_UNITS = (4, 8, 4)
SHUFFLENET_STEM = 24


class Passed(NamedTuple):
    """A tensor between two operators: who made it, its channels, its rows and columns."""

    layer: str
    channels: int
    size: int


def mobilenet_v1() -> Iterator[Passed]:
    """Depthwise and pointwise convolution of a layer are one operator."""
    size = 112
    yield Passed("stem", 32, size)
    for number, (channels, stride) in enumerate(MOBILENET_V1_LAYERS, 1):
        size //= stride
        yield Passed(f"separable {number}", channels, size)
    yield Passed("pool", 1024, 1)


def mobilenet_v2() -> Iterator[Passed]:
    """A block is one operator, and so are the last convolution and the average after it."""
    yield Passed("stem", STEM_CHANNELS, 112)
    for number, (block, size) in enumerate(mobilenet_v2_block_inputs(), 1):
        yield Passed(f"block {number}", block.out_channels, block.output_hw(size, size)[0])
    yield Passed("last convolution and pool", LAST_CHANNELS, 1)


def shufflenet(scale: int = 2, groups: int = 3) -> Iterator[Passed]:
    """A unit is one operator; its input and output are shortcuts, as wide as the stage."""
    size = 112
    yield Passed("stem", scale * SHUFFLENET_STEM, size)
    size //= 2
    yield Passed("max pool", scale * SHUFFLENET_STEM, size)
    stages = zip(SHUFFLENET_STAGES[groups], SHUFFLENET_UNITS, strict=True)
    for stage, (channels, units) in enumerate(stages, 2):
        size //= 2
        for unit in range(1, units + 1):
            yield Passed(f"stage {stage} unit {unit}", scale * channels, size)
    yield Passed("pool", scale * SHUFFLENET_STAGES[groups][-1], 1)


_LAYERS = {
    "MobileNetV1": mobilenet_v1,
    "MobileNetV2": mobilenet_v2,
    "ShuffleNet": shufflenet,
}

# Network -> (channels, kB) at each of SIZES, and kB at most, as printed. None: "1/O(1)".
_BELOW_112 = {
    "MobileNetV1": ((128, 800), (256, 400), (512, 200), (1024, 199), (1024, 2)),
    "MobileNetV2": ((32, 200), (64, 100), (160, 62), (320, 32), (1280, 2)),
    "ShuffleNet": ((48, 300), (400, 600), (800, 310), (1600, 156), (1600, 3)),
}
_AT_112 = {
    "first": {"MobileNetV1": (64, 1600), "MobileNetV2": (16, 400), "ShuffleNet": (32, 800)},
    "current": dict.fromkeys(NETWORKS),
}
_AT_MOST = {
    "first": {"MobileNetV1": 1600, "MobileNetV2": 400, "ShuffleNet": 600},
    "current": {"MobileNetV1": 800, "MobileNetV2": 200, "ShuffleNet": 600},
}

_GROUP_SIZE = (
    "the paper counts the output channels of a group of blocks at the size of the group's input;"
    " the first block of the group halves it, so that fewer channels are there"
)
_TWO_GROUPS = (
    "400, 800 and 1600 are twice the channels that ShuffleNet has with 2 groups; with 3 groups it"
    " has 480, 960 and 1920"
)
# Why the layers give another number than the table prints; size 0 is the line of the largest.
_REASONS = {
    ("MobileNetV1", 7): "1024x7x7 are 100 kB at 16 bit; the paper prints what they are at 32 bit",
    **{("MobileNetV2", size): _GROUP_SIZE for size in (56, 28, 14)},
    ("ShuffleNet", 112): "its first convolution has 24 channels, 48 at 2x; the paper counts 32",
    **{("ShuffleNet", size): _TWO_GROUPS for size in (28, 14, 7, 1)},
}
_AT_MOST_REASONS = {
    ("first", "ShuffleNet"): "the paper leaves the tensor at 112x112 out, which is the largest; "
    + _TWO_GROUPS,
    ("current", "MobileNetV2"): _GROUP_SIZE,
    ("current", "ShuffleNet"): _TWO_GROUPS,
}


@dataclass(frozen=True)
class Cell:
    """One network at one size of the table, or its largest tensor (size None).

    channels and nbytes are ours, None where the tensor is streamed and takes O(1); printed_channels
    and printed_kb are the paper's, None for O(1) and for what it does not print. reason: why the
    two differ, None where they agree.
    """

    network: str
    size: int | None
    channels: int | None
    nbytes: int | None
    printed_channels: int | None
    printed_kb: int | None
    reason: str | None

    @property
    def agrees(self) -> bool:
        """Same channels, and kilobytes (of 1000 bytes) as the paper rounds them."""
        if self.nbytes is None or self.printed_kb is None:
            return self.nbytes is None and self.printed_kb is None
        same_channels = self.size is None or self.channels == self.printed_channels
        return same_channels and _rounds_to(self.nbytes / 1000, self.printed_kb)


def _rounds_to(kilobytes: float, printed: int) -> bool:
    # The paper keeps one or two digits, and whole kilobytes of small tensors: 2.56 is printed 2.
    return abs(kilobytes - printed) < max(0.05 * printed, 1)


def table_3(version: Version = "current") -> list[Cell]:
    """Table 3, network by network, from 112x112 down to 1x1, then the largest.

    In the first version MobileNetV2's stem streams into block 1, in the current one every
    network's tensors at 112x112 are streamed.

    Raises:
        ValueError: there is no such version.
    """
    if version not in VERSIONS:
        raise ValueError(f"table_3: version must be first or current, got {version!r}")
    cells = []
    for network in NETWORKS:
        kept = [t for t in _LAYERS[network]() if not _streams(version, network, t)]
        printed = dict(zip(SIZES, (_AT_112[version][network], *_BELOW_112[network]), strict=True))
        for size in SIZES:
            channels = max((t.channels for t in kept if t.size == size), default=None)
            nbytes = None if channels is None else channels * size**2 * ITEMSIZE
            printed_channels, printed_kb = printed[size] or (None, None)
            cells.append(
                _cell(network, size, channels, nbytes, printed_channels, printed_kb, version)
            )
        largest = max(t.channels * t.size**2 * ITEMSIZE for t in kept)
        at_most = _AT_MOST[version][network]
        cells.append(_cell(network, None, None, largest, None, at_most, version))
    return cells


def _streams(version: Version, network: str, tensor: Passed) -> bool:
    if version == "current":
        return tensor.size == 112
    return network == "MobileNetV2" and tensor.layer == "stem"


def _cell(network, size, channels, nbytes, printed_channels, printed_kb, version) -> Cell:
    cell = Cell(network, size, channels, nbytes, printed_channels, printed_kb, None)
    if cell.agrees:
        return cell
    reason = _AT_MOST_REASONS[version, network] if size is None else _REASONS[network, size]
    return Cell(network, size, channels, nbytes, printed_channels, printed_kb, reason)
