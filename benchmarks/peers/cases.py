"""What is run: the 17 blocks of MobileNetV2, the whole network, sizes and relatives of it."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from mnv2_kernels.block import cost
from mnv2_kernels.profiling.variants import variants

from .. import harness

BATCHES = (1, 8, 32)
# Other networks, by the names that `named_model` takes.
RELATIVES = {
    "mobilenet_v3_large": "torchvision:mobilenet_v3_large",
    "mobilenet_v3_small": "torchvision:mobilenet_v3_small",
    "efficientnet_b0": "torchvision:efficientnet_b0",
    "efficientnet_lite0": "timm:efficientnet_lite0",
}
NAMES = (
    *(f"net_b{batch}" for batch in BATCHES),
    *(f"block{number:02}_b1" for number in range(1, 18)),
    *(f"size_{width}_{resolution}_b1" for width, resolution in harness.SIZES),
    *(f"{name}_b{batch}" for name in RELATIVES for batch in (1, 8)),
)
DEFAULT = ("net_*", "block*")


@dataclass(frozen=True)
class Case:
    """One workload on a number of threads.

    `net_b8/t2`, `block05_b1/t1`, `size_0.35_96_b1/t1`, `mobilenet_v3_large_b1/t1`.
    """

    workload: str
    threads: int

    def __str__(self) -> str:
        return f"{self.workload}/t{self.threads}"

    @property
    def block(self) -> int | None:
        """Number of the block, 1 to 17; None for a whole network."""
        kind = self.workload.partition("_")[0]
        return int(kind.removeprefix("block")) if kind.startswith("block") else None

    @property
    def size(self) -> tuple[float, int] | None:
        """Width and resolution of a network of this package; None for other workloads."""
        kind, *fields = self.workload.split("_")
        return (float(fields[0]), int(fields[1])) if kind == "size" else None

    @property
    def relative(self) -> str | None:
        """The library and the name of another network; None for other workloads."""
        return RELATIVES.get(self.workload.rpartition("_b")[0])

    @property
    def batch(self) -> int:
        return int(self.workload.rpartition("_b")[2])

    @property
    def flops(self) -> int:
        if self.relative is not None:
            return self.batch * harness.known_network_flops(self.relative, 224)
        if self.block is None:
            return 2 * cost.network_multiply_adds(*(self.size or ()), batch=self.batch)
        config, size = harness.BLOCKS[self.block - 1]
        return cost.flops(config, size, size, batch=self.batch)

    def labels(self) -> dict[str, object]:
        """What rows say of the workload."""
        if self.relative is not None:
            return {"model": self.relative.replace(":", " "), "resolution": 224}
        if self.size is not None:
            width, resolution = self.size
            return {
                "model": "mnv2_kernels mobilenet_v2",
                "width": width,
                "resolution": resolution,
            }
        if self.block is None:
            return {"model": harness.network()[0], "resolution": 224}
        config, size = harness.BLOCKS[self.block - 1]
        return {"block": self.block, "config": config.name, "resolution": size}

    def model(self) -> nn.Module:
        """As written, in evaluation mode, with the same random weights in every process."""
        if self.relative is not None:
            return deepcopy(harness.known_network(self.relative))
        if self.size is not None:
            return harness.network_of_width(self.size[0])
        if self.block is None:
            return deepcopy(harness.network()[1])
        return harness.block_module(harness.BLOCKS[self.block - 1][0])

    def input(self) -> Tensor:
        """x (N, C, H, W), channels_last, the same in every process."""
        if self.block is None:
            return harness.image(3, 224 if self.size is None else self.size[1], self.batch)
        config, size = harness.BLOCKS[self.block - 1]
        return harness.image(config.in_channels, size, self.batch)


def select(patterns: Sequence[str], threads: Sequence[int]) -> list[Case]:
    """The cases whose names fit one of the patterns (`net_*/t1`), thread counts together.

    Raises:
        ValueError: a pattern fits none.
    """
    every = [Case(name, count) for count in threads for name in NAMES]
    for pattern in patterns:
        if not any(fnmatchcase(str(case), pattern) for case in every):
            raise ValueError(
                f"--cases must fit names from {every[0]} to {every[-1]}, {pattern} fits none"
            )
    return [case for case in every if any(fnmatchcase(str(case), p) for p in patterns)]


def folded(model: nn.Module) -> nn.Module:
    """The same layers with batch norm folded into the convolutions, channels_last."""
    return variants(model)["folded"]
