"""Floors on a GPU: bytes, limits and times of blocks whose figures were worked out by hand."""

import pytest

from benchmarks import harness
from benchmarks.gpu import roofline
from mnv2_kernels.block import cost

H200 = roofline.Rates(bandwidth=4.3e12, tensor=790e12, core=134e12)


def image_bytes(number: int, execution: str) -> int:
    """Bytes that one more image adds: activations alone."""
    block, size = harness.BLOCKS[number - 1]

    def total(batch: int) -> int:
        passes = roofline.block_passes(block, size, execution=execution, batch=batch)
        return sum(kernel.bytes for kernel in passes)

    return total(2) - total(1)


def block_floor(number: int, execution: str, batch: int) -> float:
    block, size = harness.BLOCKS[number - 1]
    passes = roofline.block_passes(block, size, execution=execution, batch=batch)
    return roofline.floor(passes, H200)


@pytest.mark.parametrize(
    ("number", "execution", "kilobytes"),
    [
        (1, "fused", 1204),
        (1, "eager", 6824),
        (3, "fused", 301),
        (3, "folded", 4064),
        (3, "eager", 11892),
        (17, "fused", 47),
    ],
)
def test_bytes_of_an_image(number, execution, kilobytes):
    assert image_bytes(number, execution) == pytest.approx(kilobytes * 1e3, abs=500)


def test_weights_are_counted_once_whatever_the_batch():
    block, size = harness.BLOCKS[14]
    (kernel,) = roofline.block_passes(block, size, execution="fused")
    assert kernel.bytes - image_bytes(15, "fused") == pytest.approx(640.0e3, abs=50)


@pytest.mark.parametrize("execution", cost.EXECUTIONS)
def test_the_kernels_do_what_the_blocks_do(execution):
    for block, size in harness.BLOCKS:
        passes = roofline.block_passes(block, size, execution=execution, batch=3)
        flops = sum(kernel.tensor_flops + kernel.core_flops for kernel in passes)
        assert flops == cost.flops(block, size, size, batch=3)
        moved = cost.bytes_moved(block, size, size, execution=execution, batch=3, itemsize=2)
        assert sum(kernel.bytes for kernel in passes) == moved


@pytest.mark.parametrize(
    ("number", "execution", "batch", "microseconds"),
    [
        (3, "fused", 256, 17.9),
        (3, "folded", 256, 242),
        (2, "folded", 256, 391),
        (1, "fused", 256, 71.7),
        (5, "fused", 256, 6.24),
        (15, "fused", 1, 0.156),
        (17, "folded", 32, 3.51),
    ],
)
def test_floors_of_blocks(number, execution, batch, microseconds):
    assert block_floor(number, execution, batch) == pytest.approx(microseconds / 1e6, rel=0.005)


def test_what_limits_a_block():
    def limit(number: int, batch: int) -> str:
        block, size = harness.BLOCKS[number - 1]
        (kernel,) = roofline.block_passes(block, size, execution="fused", batch=batch)
        return roofline.limit(kernel, H200)

    assert [limit(n, 256) for n in (1, 4, 5, 17)] == ["bytes", "bytes", "tensor", "tensor"]
    assert limit(17, 1) == "bytes"
    slow = H200._replace(core=1e12)
    assert roofline.limit(roofline.Pass(10, 10, 10), slow) == "depthwise"


@pytest.mark.parametrize(
    ("batch", "execution", "images_per_second"),
    [
        (1, "fused", 383_421),
        (256, "fused", 775_923),
        (256, "folded", 156_664),
        (1024, "folded", 156_718),
    ],
)
def test_floors_of_the_network(batch, execution, images_per_second):
    passes = roofline.network_passes(execution=execution, batch=batch)
    assert batch / roofline.floor(passes, H200) == pytest.approx(images_per_second, rel=0.001)


def test_network_flops_are_those_of_the_network():
    passes = roofline.network_passes(1.4, 192, execution="folded", batch=2)
    flops = sum(kernel.tensor_flops + kernel.core_flops for kernel in passes)
    assert flops == 2 * cost.network_multiply_adds(1.4, 192, batch=2)
