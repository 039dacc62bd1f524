"""The arithmetic against the paper's numbers and against PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv3 import InvertedResidual as TorchvisionBlock
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from mnv2_kernels import InvertedResidual
from mnv2_kernels.block import cost
from mnv2_kernels.block.config import (
    MOBILENET_V2_SETTINGS,
    BlockConfig,
    mobilenet_v2_block_inputs,
    mobilenet_v2_blocks,
)
from mnv2_kernels.profiling import table_3

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


def test_squeeze_excite_against_torchvision():
    """A block of MobileNetV3: its third."""
    settings = InvertedResidualConfig(24, 5, 72, 40, True, "RE", 2, 1, 1.0)
    module = TorchvisionBlock(settings, nn.BatchNorm2d).eval()
    block = BlockConfig(24, 72, 40, 2, kernel_size=5, padding=(2,) * 4, squeeze_channels=24)
    assert block.name == "24x72x40-s2-k5-se24"
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(2, 24, 13, 10))
    assert cost.flops(block, 13, 10, batch=2) == counter.get_total_flops()
    assert cost.parameters(block) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("execution", cost.EXECUTIONS)
def test_what_squeeze_excite_adds(execution):
    block = BlockConfig(8, 48, 16)
    gated = replace(block, squeeze_channels=12)
    depthwise = cost.tensor_bytes(block, 7, 9, itemsize=2).depthwise
    moved = [cost.bytes_moved(b, 7, 9, execution=execution, itemsize=2) for b in (block, gated)]
    weights = 2 * 2 * 48 * 12 + 4 * (12 + 48)
    passes = 0 if execution == "fused" else 3 * depthwise
    assert moved[1] - moved[0] == weights + passes
    # Alone at t = 1 the largest operator is the one that multiplies.
    block = BlockConfig(8, 8, 1, expansion=False)
    peaks = [
        cost.peak_bytes(b, 7, 9, execution=execution)
        for b in (block, replace(block, squeeze_channels=4))
    ]
    x, _, depthwise, y = cost.tensor_bytes(block, 7, 9)
    folded, fused = [x + depthwise + y, x + 2 * depthwise], [x + y] * 2
    # Eager's batch norm holds as much.
    eager = [x + 2 * depthwise] * 2
    assert peaks == {"eager": eager, "folded": folded, "fused": fused}[execution]


def test_unknown_execution_is_refused():
    with pytest.raises(ValueError, match="execution must be one of eager, folded, fused, got 'x'"):
        cost.peak_bytes(*BLOCKS[0], 112, execution="x")


def test_peak_of_a_chain():
    operator = cost.ChainOperator
    assert cost.chain_peak_bytes([operator(10, 20), operator(20, 5, 8), operator(5, 1)]) == 33
    assert cost.chain_peak_bytes(iter([operator(3, 4)])) == 7
    with pytest.raises(ValueError, match="operators must be at least one, got none"):
        cost.chain_peak_bytes([])


def test_a_chain_of_the_passes_of_a_block_is_its_folded_peak():
    """M(G) of the three operators, each with its input and result, for a block without residual."""
    for number in (2, 4, 11):
        block, size = BLOCKS[number - 1]
        sizes = cost.tensor_bytes(block, size, size)
        tensors = (sizes.x, sizes.expanded, sizes.depthwise, sizes.y)
        operators = [cost.ChainOperator(a, b) for a, b in zip(tensors, tensors[1:], strict=False)]
        folded = cost.peak_bytes(block, size, size, execution="folded")
        # The caller holds x from first to last.
        held = max(sizes.x * (i > 0) + sum(o) for i, o in enumerate(operators))
        assert held == folded >= cost.chain_peak_bytes(operators) >= folded - sizes.x


def test_a_block_split_in_groups():
    """The paper's |x| + |y| + O(max(s^2, s'^2)) where every hidden channel is a group."""
    block, size = BLOCKS[1]
    x, expanded, depthwise, y = cost.tensor_bytes(block, size, size, itemsize=2)
    one = cost.split_block(block, size, size, groups=96, itemsize=2)
    assert one == (112 * 112 * 16 * 2, 56 * 56 * 24 * 2, (112 * 112 + 56 * 56) * 2)
    assert one[:2] == (x, y)
    whole = cost.split_block(block, size, size, groups=1, itemsize=2)
    assert whole.scratch == expanded + depthwise
    # 96 channels in 5 groups are 20 in the largest.
    five = cost.split_block(block, size, size, groups=5, itemsize=2)
    assert five.scratch == 20 * one.scratch
    eight = cost.split_block(block, size, size, groups=96, itemsize=2, batch=8)
    assert eight == (8 * x, 8 * y, one.scratch)
    no_expansion, size = BLOCKS[0]
    assert cost.split_block(no_expansion, size, size, groups=32).scratch == 112 * 112 * 4


@pytest.mark.parametrize("groups", [0, 97])
def test_groups_must_be_some_of_the_hidden_channels(groups):
    with pytest.raises(ValueError, match=f"groups must be from 1 to 96.*got {groups}"):
        cost.split_block(BLOCKS[1][0], 112, 112, groups=groups)


def cells(version, network):
    found = table_3.table_3(version)
    return {c.size: c for c in found if c.network == network}


# Ours, counted by hand from the layers of the three papers: channels by size; bytes of the largest.
TABLE_3 = {
    "MobileNetV1": {112: 64, 56: 128, 28: 256, 14: 512, 7: 1024, 1: 1024},
    "MobileNetV2": {112: 16, 56: 24, 28: 32, 14: 96, 7: 320, 1: 1280},
    "ShuffleNet": {112: 48, 56: 48, 28: 480, 14: 960, 7: 1920, 1: 1920},
}
LARGEST = {
    "first": {"MobileNetV1": 1605632, "MobileNetV2": 401408, "ShuffleNet": 1204224},
    "current": {"MobileNetV1": 802816, "MobileNetV2": 150528, "ShuffleNet": 752640},
}


@pytest.mark.parametrize("version", table_3.VERSIONS)
@pytest.mark.parametrize("network", TABLE_3)
def test_table_3_from_the_layers(version, network):
    found = cells(version, network)
    assert list(found) == [112, 56, 28, 14, 7, 1, None]
    for size, channels in TABLE_3[network].items():
        if version == "current" and size == 112:
            assert (found[size].channels, found[size].nbytes) == (None, None)
        else:
            assert (found[size].channels, found[size].nbytes) == (channels, 2 * channels * size**2)
    assert found[None].nbytes == LARGEST[version][network]


# Of `paper.md`: what the paper prints, in kB, and which of it the layers give.
@pytest.mark.parametrize(
    "version, network, kilobytes, agreeing",
    [
        ("first", "MobileNetV1", (1600, 800, 400, 200, 199, 2, 1600), (112, 56, 28, 14, 1, None)),
        ("current", "MobileNetV1", (None, 800, 400, 200, 199, 2, 800), (112, 56, 28, 14, 1, None)),
        ("first", "MobileNetV2", (400, 200, 100, 62, 32, 2, 400), (112, 7, 1, None)),
        ("current", "MobileNetV2", (None, 200, 100, 62, 32, 2, 200), (112, 7, 1)),
        ("first", "ShuffleNet", (800, 300, 600, 310, 156, 3, 600), (56,)),
        ("current", "ShuffleNet", (None, 300, 600, 310, 156, 3, 600), (112, 56)),
    ],
)
def test_a_reason_where_the_paper_prints_another_number(version, network, kilobytes, agreeing):
    found = cells(version, network)
    assert tuple(c.printed_kb for c in found.values()) == kilobytes
    assert tuple(size for size, c in found.items() if c.agrees) == agreeing
    for size, cell in found.items():
        assert (cell.reason is None) == (size in agreeing)


def test_the_reasons_give_the_printed_numbers():
    printed = cells("first", "ShuffleNet")
    two_groups = {t.size: t.channels for t in table_3.shufflenet(groups=2)}
    for size in (28, 14, 7, 1):
        assert two_groups[size] == printed[size].printed_channels
    printed = cells("first", "MobileNetV2")
    size, at_input = 112, {}
    for _, channels, _, stride in MOBILENET_V2_SETTINGS:
        at_input[size] = channels
        size //= stride
    for size in (56, 28, 14, 7):
        assert at_input[size] == printed[size].printed_channels
        assert 2 * at_input[size] * size**2 / 1000 == pytest.approx(
            printed[size].printed_kb, rel=0.03
        )
    wide = cells("first", "MobileNetV1")[7]
    assert pytest.approx(wide.printed_kb, rel=0.01) == 4 * 1024 * 49 / 1000


def test_unknown_versions_of_the_table_are_refused():
    with pytest.raises(ValueError, match="version must be first or current, got 'second'"):
        table_3.table_3("second")
