"""Memory of blocks with a squeeze-excite and of networks of them: the expanded tensor never is.

`python test_gated_memory.py print_allocations` prints those of blocks as JSON, while the kernel
says on stderr how it cuts them into pieces.
"""

import json
import math
import re
import sys
from dataclasses import replace
from functools import cache, partial

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from cases import DTYPES
from mbconv_blocks import MBConvCase
from same_answers import randomise
from torch import Tensor
from torchvision import models

import mnv2_kernels as mk
from mnv2_kernels.block.config import NO_CLIP, BlockConfig
from mnv2_kernels.network.plan import Plan
from mnv2_kernels.profiling import memory
from mnv2_kernels.profiling.memory_report import planned_bytes

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

OF_A_THREAD = 300 * 1024
THREADS, BATCHES = (1, 2, 3), (1, 2, 3, 7)


def gated(c_in: int, hidden: int, c_out: int, stride: int, kernel: int, size: int) -> MBConvCase:
    """A block of EfficientNet with a quarter of its input's channels squeezed."""
    config = BlockConfig(
        c_in,
        hidden,
        c_out,
        stride=stride,
        expansion=hidden != c_in,
        kernel_size=kernel,
        padding=(kernel // 2,) * 4,
        residual=stride == 1 and c_in == c_out,
        squeeze_channels=max(1, c_in // 4),
    )
    between = ("silu" if config.expansion else NO_CLIP, "silu", NO_CLIP)
    return MBConvCase(config, size, size, between=between, squeeze="silu", scale="sigmoid")


# Without an expansion, of stride 2 at many pixels, then of stride 1, at few pixels; uneven.
BLOCKS = (
    gated(32, 32, 16, 1, 3, 112),
    gated(16, 96, 24, 2, 3, 112),
    gated(24, 144, 24, 1, 3, 56),
    gated(40, 240, 80, 2, 3, 28),
    gated(80, 480, 80, 1, 3, 14),
    gated(112, 672, 192, 2, 5, 14),
    gated(192, 1152, 320, 1, 3, 7),
    replace(gated(9, 53, 9, 1, 5, 33), width=41),
)


def pixels_of(case: MBConvCase) -> int:
    return math.prod(case.config.output_hw(case.height, case.width))


def print_allocations(dtype: str) -> None:
    for case in BLOCKS:
        x, weights = replace(case, batch=max(BATCHES)).inputs(getattr(torch, dtype))
        x = x.contiguous(memory_format=torch.channels_last)
        for threads in THREADS:
            torch.set_num_threads(threads)
            call = partial(mk.inverted_residual, weights=weights, **case.settings)
            sizes = {n: memory.allocations(partial(call, x[:n])) for n in BATCHES}
            print(json.dumps([threads, sizes]), flush=True)


SAID = re.compile(
    r"mnv2 (\w+) (\d+)x(\d+) (\d+)-(\d+)-(\d+) .*rows_per_step (\d+),.* scratch (\d+) bytes"
)
LANES = {"avx512": 16, "avx2": 8}


def kept_bytes(case: MBConvCase, lanes: int, rows_per_step: int) -> int:
    """Of one image: the depthwise result, sums of every step, means, and what the gate's two layers
    give; each in whole cache lines, channels in whole vectors.
    """
    config = case.config
    height, _ = config.output_hw(case.height, case.width)
    width = -(-config.hidden_channels // lanes) * lanes
    steps = -(-height // rows_per_step)
    pieces = (pixels_of(case) * width, steps * width, width, config.squeeze_channels, width)
    return sum(-(-floats // 16) * 64 for floats in pieces)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_block_allocates(dtype, python):
    """To the byte, by what the kernel says of its scratch; and by what the sizes say."""
    name = str(dtype).removeprefix("torch.")
    variables = {"MNV2_PRINT_CONFIGS": "1", "OMP_NUM_THREADS": "1"}
    done = python(__file__, "print_allocations", name, **variables)
    assert done.returncode == 0, done.stderr
    lines = iter(map(json.loads, done.stdout.splitlines()))
    said = SAID.findall(done.stderr)
    for case, (kernel, *numbers) in zip(BLOCKS, said, strict=True):
        c, pixels = case.config, pixels_of(case)
        *sizes, rows_per_step, scratch = map(int, numbers)
        channels = [c.in_channels, c.hidden_channels, c.out_channels]
        assert sizes == [case.height, case.width, *channels]
        kept = kept_bytes(case, LANES.get(kernel, 4), rows_per_step)
        result = dtype.itemsize * pixels * c.out_channels
        for threads in THREADS:
            number, measured = next(lines)
            assert number == threads
            for batch, found in measured.items():
                in_work = threads if int(batch) >= threads else 1
                workspace = threads * scratch + in_work * kept
                assert found == [int(batch) * result, workspace], (case, batch)
        # The sums of every step are the most of what is not the depthwise result itself.
        assert scratch <= OF_A_THREAD and kept - 4 * pixels * c.hidden_channels <= OF_A_THREAD
        expanded = 4 * case.height * case.width * c.hidden_channels
        if c.stride == 2 and expanded > 2**20:
            assert kept + scratch < expanded, case
    assert next(lines, None) is None


NETWORKS = {
    # Name: most bytes that a call for one image of 224 x 224 holds, its input included.
    "mobilenet_v3_small": 1_250_000,
    "mobilenet_v3_large": 2_600_000,
    "efficientnet_b0": 3_600_000,
}
networks = pytest.mark.parametrize("name", NETWORKS)


@cache
def planned(name: str, dtype: torch.dtype, size: tuple[int, int] = (224, 224)) -> Plan:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mk.plan(randomise(getattr(models, name)()), (3, *size), dtype=dtype)


def images(plan: Plan, batch: int) -> Tensor:
    return torch.randn(batch, *plan.input_shape).to(plan.dtype)


@networks
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, (224, 224)), (torch.bfloat16, (97, 130))], ids=str
)
def test_a_plan_allocates_what_it_computes(name, dtype, size, set_threads):
    plan = planned(name, dtype, size)
    for threads in (1, 2, 3):
        set_threads(threads)
        for batch in (1, 2, 4):
            x = images(plan, batch)
            sizes = memory.allocations(partial(plan, x))
            assert len(sizes) == 2 and sizes[0] == batch * 1000 * dtype.itemsize
            assert x.nbytes + sum(sizes) == planned_bytes(plan, batch), (threads, batch)


@networks
def test_what_a_plan_says(name, set_threads):
    set_threads(1)
    plan = planned(name, torch.float32)
    x = images(plan, 1)
    _, workspace = memory.allocations(partial(plan, x))
    assert workspace == plan.arena_bytes + plan.line_bytes(1)
    assert f"arena {plan.arena_bytes:,} bytes; line buffers and scratch" in str(plan)
    assert f"scratch {plan.line_bytes(1):,} bytes for one thread" in str(plan)
    assert x.nbytes + memory.peak_bytes(partial(plan, x)) <= NETWORKS[name]


@networks
def test_a_plan_holds_less_than_one_expanded_tensor_more(name, set_threads):
    """Of the layers, the largest depthwise's input and result are alive at once."""
    set_threads(1)
    plan, layers = planned(name, torch.float32), getattr(models, name)().eval()
    x = images(plan, 1)
    with torch.no_grad():
        eager = memory.peak_bytes(lambda: layers(x))
    assert memory.peak_bytes(partial(plan, x)) < eager / 2


@networks
@pytest.mark.parametrize("threads", [1, 2])
def test_an_owned_arena(name, threads, set_threads):
    set_threads(threads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(getattr(models, name)())
    plan = mk.plan(model, (3, 97, 130), own_arena=True)
    assert plan.owned_bytes == plan._most_bytes(threads)
    for batch in (1, 2, 5):
        x = images(plan, batch)
        assert memory.allocations(partial(plan, x)) == [batch * 4000]
        assert torch.equal(plan(x), planned(name, torch.float32, (97, 130))(x))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
