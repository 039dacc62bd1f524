"""Conversions of 16-bit numbers by the CPU kernels, exhaustively and in the instruction set in use.

Every pattern of bits goes through the op where it reads numbers (x, weights, the residual), and
float32 numbers through it where it rounds: a bias is float32, and alone decides the result where
the weights are zero. PyTorch's own conversions are the truth.
"""

from dataclasses import replace

import pytest
import torch
from cases import Case, run
from rounding import multiplies_pairs
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig

pytestmark = pytest.mark.usefixtures("kernel_backend")
NARROW = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16).to(torch.int16).view(dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same bits, zeros with their signs; NaN wherever there is any NaN."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    same = found.view(torch.int16) == expected.view(torch.int16)
    wrong = ~(same | nan)
    assert not wrong.any(), f"{found[wrong][:5]} for {expected[wrong][:5]}, {wrong.sum()} in all"


def weights_of(dtype: torch.dtype, w_project: Tensor, taps: Tensor | None = None) -> FoldedWeights:
    """Of a block without expansion and clips, whose depthwise multiplies pixels by `taps`.

    Nothing is added but zeros that keep the sign of a zero.
    """
    hidden, out_channels = w_project.shape
    w_dw = torch.zeros(3, 3, hidden, dtype=dtype)
    w_dw[1, 1] = 1 if taps is None else taps
    zeros = [torch.full((n,), -0.0) for n in (hidden, out_channels)]
    return FoldedWeights(None, None, w_dw, zeros[0], w_project, zeros[1], *(NO_CLIP,) * 3)


def pixels(*channels: Tensor) -> Tensor:
    """Images of one pixel each, so that no other tap of a window touches a number."""
    return torch.stack(channels, 1)[:, :, None, None]


@each_dtype
@pytest.mark.parametrize("out_channels", [1, 2, 37])
def test_every_number_is_read_from_x_and_stored(dtype, out_channels):
    """One channel in: an odd count, so numbers are converted and not multiplied in pairs."""
    numbers = every_number(dtype)
    weights = weights_of(dtype, torch.ones(1, out_channels, dtype=dtype))
    y = run("cpu", pixels(numbers), weights)
    for channel in range(out_channels):
        assert_same(y[:, channel, 0, 0].clone(), numbers)


@each_dtype
@pytest.mark.parametrize("channels", [3, 16, 37])
def test_every_number_is_read_in_every_lane(dtype, channels):
    """The other channels are zeros, of which the sum takes no notice, but for a zero's sign."""
    numbers = every_number(dtype)
    numbers = numbers[numbers != 0]
    weights = weights_of(dtype, torch.ones(channels, 1, dtype=dtype))
    expected = numbers
    if multiplies_pairs(Case(BlockConfig(channels, channels, 1, expansion=False), 1, 1), dtype):
        expected = without_denormals(numbers)
    for channel in {0, 1, 14, 15, 16, channels - 1}.intersection(range(channels)):
        x = [torch.zeros_like(numbers)] * channels
        x[channel] = numbers
        y = run("cpu", pixels(*x), weights)[:, 0, 0, 0].clone()
        assert_same(torch.where(y == 0, y.abs(), y), torch.where(expected == 0, 0, expected))


def without_denormals(numbers: Tensor) -> Tensor:
    """As AVX512-BF16 counts them: zeros, with their signs."""
    small = numbers.abs() < torch.finfo(numbers.dtype).smallest_normal
    return torch.where(small, numbers * 0, numbers)


@each_dtype
@pytest.mark.parametrize("hidden", [1, 2])
def test_every_number_is_read_from_a_weight(dtype, hidden):
    """Times one; with two hidden channels bfloat16 is multiplied in pairs where the CPU can."""
    numbers = every_number(dtype).reshape(64, 1024)
    pairs = multiplies_pairs(Case(BlockConfig(hidden, hidden, 1024, expansion=False), 1, 1), dtype)
    for row in numbers:
        w_project = torch.zeros(hidden, 1024, dtype=dtype)
        w_project[hidden - 1] = row
        x = pixels(*torch.ones(hidden, 1, dtype=dtype))
        y = run("cpu", x, weights_of(dtype, w_project))[0, :, 0, 0].clone()
        if hidden == 1:
            assert_same(y, row)
        else:
            expected = without_denormals(row) if pairs else row
            assert_same(torch.where(y == 0, y.abs(), y), torch.where(expected == 0, 0, expected))


@each_dtype
@pytest.mark.parametrize("hidden", [16, 256])
def test_every_number_is_read_as_the_residual(dtype, hidden):
    """Times zero after an expansion that is clipped; 256 hidden channels are two groups."""
    numbers = every_number(dtype)
    x = numbers.reshape(1024, 1, 8, 8)
    weights = weights_of(dtype, torch.zeros(hidden, 1, dtype=dtype))
    weights = replace(weights, w_expand=torch.ones(1, hidden, dtype=dtype), clip_expand=RELU6)
    y = run("cpu", x, replace(weights, w_project=-weights.w_project), residual=True)
    assert torch.equal(numbers.isnan(), (x.isnan() & y.isnan()).flatten())
    # NaN in the window of a pixel reaches it: only the residual, where there is no other.
    reached = torch.nn.functional.max_pool2d(x.isnan().float(), 3, 1, 1) > 0
    kept = (x.isnan() | ~reached).flatten()
    assert kept.float().mean() > 0.9
    if hidden == 256:  # The sums of the second group begin with +0.
        y, numbers = torch.where(y == 0, 0, y), torch.where(numbers == 0, 0, numbers)
    assert_same(y.flatten()[kept], numbers[kept])


def to_be_rounded(dtype: torch.dtype) -> Tensor:
    """float32: every number of the dtype, and between any two of them the middle and around it."""
    if dtype == torch.bfloat16:
        low = torch.tensor([0, 1, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        bits = (torch.arange(1 << 16)[:, None] << 16 | low).flatten()
    else:
        positive = torch.arange(0x7C00).to(torch.int16).view(torch.float16).double()
        beyond = torch.tensor([65536.0], dtype=torch.float64)
        middles = (positive + torch.cat([positive[1:], beyond])) / 2
        exact = torch.cat([positive, middles]).float().view(torch.int32).long()
        bits = torch.cat([exact, exact - 1, exact + 1]).clamp_min(0)
        smallest = torch.tensor([0, 1, 0x400000, 0x7FFFFF, 0x800000, 0x32FFFFFF, 0x33000000])
        largest = torch.tensor([0x477FE000, 0x47800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000])
        nan = 0x7FC00000 + (1 << torch.arange(22))
        bits = torch.cat([bits, smallest, largest, nan])
        bits = torch.cat([bits, bits | 1 << 31])
    return bits.to(torch.int32).view(torch.float32)


@each_dtype
def test_float32_is_rounded_to_the_nearest_even(dtype):
    numbers = to_be_rounded(dtype)
    quiet = numbers.isnan() & (numbers.view(torch.int32) & 0x400000 == 0)
    numbers = numbers[~quiet]  # Signalling NaN, which the first sum makes quiet.
    x = pixels(torch.zeros(1, dtype=dtype))
    for biases in numbers.split(1000):
        w_project = torch.full((1, len(biases)), -0.0, dtype=dtype)
        weights = replace(weights_of(dtype, w_project), b_project=biases)
        y = run("cpu", x, weights)[0, :, 0, 0].clone()
        assert_same(y, biases.to(dtype))


@pytest.mark.parametrize("tap", [1.0, 1.0078125, 1.5, -0.99609375, 3.015625, 2.0**-30])
def test_results_of_the_depthwise_are_rounded_for_pairs(tap):
    """A product of two bfloat16 numbers is exact in float32; every fourth ends in a tie or so."""
    case = Case(BlockConfig(2, 2, 1, expansion=False), 1, 1)
    numbers = every_number(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    products = numbers.float() * tap
    pairs = multiplies_pairs(case, torch.bfloat16)
    large = torch.tensor(256.0).bfloat16() if pairs else torch.tensor(1.0).bfloat16()
    w_project = torch.tensor([[0.0], [1.0]]).bfloat16() * large
    taps = torch.tensor([0.0, tap]).bfloat16()
    y = run("cpu", pixels(numbers, numbers), weights_of(torch.bfloat16, w_project, taps))
    y = y[:, 0, 0, 0]
    if pairs:
        rounded = without_denormals(products.bfloat16())
        rounded = torch.where(products.abs() < 2.0**-126, 0, rounded)
        expected = (rounded.float() * 256).bfloat16()
    else:
        expected = products.bfloat16()
    assert_same(torch.where(y == 0, y.abs(), y), torch.where(expected == 0, 0, expected))
