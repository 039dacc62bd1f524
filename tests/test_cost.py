"""The arithmetic against the paper's numbers and against PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mnv2_kernels import InvertedResidual, cost
from mnv2_kernels.block import BlockConfig, mobilenet_v2_block_inputs, mobilenet_v2_blocks

BLOCKS = list(mobilenet_v2_block_inputs())


@pytest.mark.parametrize(
    "width_mult, resolution, millions, parameters",
    [
        (1.4, 224, 582.2, 6.11),
        (1.0, 224, 300.8, 3.505),
        (1.0, 192, 221.3, 3.505),
        (1.0, 160, 154.1, 3.505),
        (1.0, 128, 99.1, 3.505),
        (1.0, 96, 56.3, 3.505),
        (0.75, 224, 209.1, 2.64),
        (0.5, 224, 97.1, 1.97),
        (0.35, 224, 59.3, 1.68),
    ],
)
def test_published_networks(width_mult, resolution, millions, parameters):
    counted = cost.network_multiply_adds(width_mult, resolution)
    assert counted / 1e6 == pytest.approx(millions, abs=0.05)
    tolerance = 0.0005 if parameters == 3.505 else 0.005
    assert cost.network_parameters(width_mult) / 1e6 == pytest.approx(parameters, abs=tolerance)


def test_the_network_of_the_paper_exactly():
    assert cost.network_parameters() == 3_504_872
    assert cost.network_multiply_adds() == 300_774_272
    assert cost.network_multiply_adds(batch=2) == 601_548_544


def test_parameters_block_by_block():
    assert [cost.parameters(block) for block in mobilenet_v2_blocks()] == (
        [896, 5136, 8832, 10000, 14848, 14848, 21056, 54272, 54272, 54272, 66624]
        + [118272, 118272, 155264, 320000, 320000, 473920]
    )


# Block number: x, E, D, y, then eager, folded, fused; MiB of float32, batch 1.
MEMORY_TABLE = {
    1: ((1.53, 0, 1.53, 0.77), (4.59, 3.83, 2.30)),
    2: ((0.77, 4.59, 1.15, 0.29), (9.95, 6.51, 1.05)),
    3: ((0.29, 1.72, 1.72, 0.29), (3.73, 3.73, 0.57)),
    13: ((0.07, 0.43, 0.43, 0.07), (0.93, 0.93, 0.14)),
}


@pytest.mark.parametrize("number", MEMORY_TABLE)
def test_memory_table_of_section_5_1(number):
    block, size = BLOCKS[number - 1]
    tensors, peaks = MEMORY_TABLE[number]
    mebibytes = [n / 2**20 for n in cost.tensor_bytes(block, size, size)]
    assert mebibytes == pytest.approx(tensors, abs=0.005)
    for execution, peak in zip(cost.EXECUTIONS, peaks, strict=True):
        computed = cost.peak_bytes(block, size, size, execution=execution)
        assert computed / 2**20 == pytest.approx(peak, abs=0.005), execution


def test_the_largest_expanded_tensor_is_that_of_block_2():
    sizes = [cost.tensor_bytes(block, n, n, itemsize=2).expanded for block, n in BLOCKS]
    assert max(sizes) == sizes[1] == 2_408_448


def test_peaks_scale_with_batch_and_element_and_scratch_does_not():
    block, size = BLOCKS[2]
    for execution in cost.EXECUTIONS:
        one = cost.peak_bytes(block, size, size, execution=execution)
        assert cost.peak_bytes(block, size, size, execution=execution, batch=8) == 8 * one
        assert cost.peak_bytes(block, size, size, execution=execution, itemsize=2) == one / 2
    fused = cost.peak_bytes(block, size, size, execution="fused", batch=4, scratch=1000)
    x, _, _, y = cost.tensor_bytes(block, size, size, batch=4)
    assert fused == x + y + 1000


def test_peak_of_a_network():
    # Block 2 of the eager and folded network, block 1 of the fused one, each with the image.
    image = 3 * 224 * 224 * 4
    for execution, mebibytes in (("eager", 9.95), ("folded", 6.51), ("fused", 2.30)):
        peak = cost.network_peak_bytes(execution=execution) - image
        assert peak / 2**20 == pytest.approx(mebibytes, abs=0.005)
    assert cost.network_peak_bytes(execution="fused", batch=3, itemsize=2) == 3 * (
        image // 2 + 112 * 112 * (32 + 16) * 2
    )


# Kilobytes of activations moved at 16 bit, counted by hand: fused, folded, eager.
@pytest.mark.parametrize(
    "number, expected", [(1, (1204, 2810, 6824)), (2, (552, 6573, 18916)), (3, (301, 4064, 11892))]
)
def test_bytes_moved(number, expected):
    block, size = BLOCKS[number - 1]
    for execution, kilobytes in zip(("fused", "folded", "eager"), expected, strict=True):
        weights = sum(o.weights for o in cost.operators(block, execution=execution, itemsize=2))
        moved = cost.bytes_moved(block, size, size, execution=execution, itemsize=2)
        assert (moved - weights) / 1000 == pytest.approx(kilobytes, abs=0.5), execution


def test_weights_are_read_once_and_biases_are_float32():
    block = BlockConfig(8, 48, 16)
    weights = 8 * 48 + 9 * 48 + 48 * 16
    fused = [o.weights for o in cost.operators(block, execution="fused", itemsize=2)]
    assert fused == [2 * weights + 4 * (48 + 48 + 16)]
    for execution, vectors in (("folded", 1), ("eager", 4)):
        passes = list(cost.operators(block, execution=execution, itemsize=4))
        assert sum(o.weights for o in passes) == 4 * (weights + vectors * (48 + 48 + 16))


@pytest.mark.parametrize("expand_ratio", [1, 6])
@pytest.mark.parametrize("stride, kernel_size", [(1, 3), (2, 3), (2, 5)])
def test_flops_are_those_of_torchs_counter(expand_ratio, stride, kernel_size):
    module = InvertedResidual(
        8, 16, stride=stride, expand_ratio=expand_ratio, kernel_size=kernel_size
    ).eval()
    x = torch.randn(2, 8, 13, 10)
    with FlopCounterMode(display=False) as counter:
        module.plain_forward(x)
    assert cost.flops(module.config, 13, 10, batch=2) == counter.get_total_flops()
    assert cost.parameters(module.config) == sum(p.numel() for p in module.parameters())


def test_unknown_execution_is_refused():
    with pytest.raises(ValueError, match="execution must be one of eager, folded, fused, got 'x'"):
        cost.peak_bytes(*BLOCKS[0], 112, execution="x")
