"""The kernels compiled for GPUs that are not here: registers, spills, instructions.

The budget holds what the pinned Triton makes of every row of the tables; it may only fall.
`python -m benchmarks.machine_code.triton_code --budget tests/triton/triton_budget.json` writes it
anew.
"""

import json
from pathlib import Path

import pytest
import torch
import triton
from cases import LONG

from benchmarks.machine_code.read import resources
from benchmarks.machine_code.triton_code import (
    ARCHITECTURES,
    arithmetic,
    code_of,
    compile_block,
    compile_launch,
    table_rows,
)
from mnv2_kernels.block.config import NO_CLIP, BlockConfig, mobilenet_v2_blocks
from mnv2_kernels.ops.triton import configs
from mnv2_kernels.ops.triton.kernels import gate
from mnv2_kernels.ops.triton.launch_gate import (
    EXCITATION_OPTIONS,
    PROJECTION_OPTIONS,
    plan_launches,
)

BUDGET = json.loads((Path(__file__).parent / "triton_budget.json").read_text())
ROWS = {row.name: row for row in table_rows()}
PINNED = triton.__version__ == BUDGET["triton"]
MOST_SPILL_BYTES = 64


def test_every_row_has_a_budget():
    assert set(BUDGET["rows"]) == set(ROWS)


# Compiling takes seconds: of older GPUs every third row, and all of them in long runs.
CODES = [
    (name, architecture)
    for i, name in enumerate(ROWS)
    for architecture in ARCHITECTURES
    if LONG or i % 3 == 0 or architecture == max(ARCHITECTURES)
]


def test_every_row_is_compiled():
    assert {name for name, _ in CODES} == set(ROWS)
    assert {architecture for _, architecture in CODES} == set(ARCHITECTURES)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name, architecture", CODES)
def test_budget(name, architecture):
    row = ROWS[name]
    code = code_of(row, architecture)
    with arithmetic(row.arithmetic) as dtype:
        bound = configs.shared_bytes(row.block, row.config, dtype)
    assert code.shared_bytes <= bound <= configs.SHARED_BYTES
    assert code.hidden_loop["HMMA"] > 0
    if PINNED:
        assert code.spill_bytes <= MOST_SPILL_BYTES
        allowed = BUDGET["rows"][name][f"sm_{architecture}"]
        over = {k: v for k, v in code.figures().items() if v > allowed[k]}
        assert not over, f"{over}, allowed {allowed}"


@pytest.mark.skipif(not PINNED, reason=f"the figure is for Triton {BUDGET['triton']}")
def test_instructions_of_block_3():
    """24-144-24 at stride 1 in fp16: 4.5 multiply-adds of pairs, and not much else."""
    row = next(r for n, r in ROWS.items() if n.endswith("24x144x24-s1-k3-float16"))
    code = code_of(row, 90)
    assert code.per_hidden_output <= 18


OTHERS = {
    "mobilenet_v1": (BlockConfig(512, 512, 1024, expansion=False), "float16"),
    "kernel 5": (
        BlockConfig(112, 672, 192, stride=2, kernel_size=5, padding=(1, 1, 2, 2)),
        "float16",
    ),
    "dilation 2": (
        BlockConfig(96, 576, 96, dilation=2, padding=(2, 2, 2, 2), residual=True),
        "bfloat16",
    ),
    "odd and many channels": (BlockConfig(961, 961, 961, residual=True), "bfloat16"),
    "one channel": (BlockConfig(1, 1, 1, residual=True), "float16"),
    "no tensor cores": (BlockConfig(24, 144, 24, residual=True), "float32"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rules_for_other_blocks_compile(name):
    block, kind = OTHERS[name]
    with arithmetic(kind) as dtype:
        choice = configs.fallback(block, dtype)
        code = compile_block(block, 14, dtype, choice.config, 90)
        bound = configs.shared_bytes(block, choice.config, dtype)
    assert code.shared_bytes <= bound <= configs.SHARED_BYTES


@pytest.mark.sampled(2)
@pytest.mark.parametrize("curve", range(1, 5))
def test_curves_compile(curve):
    block = BlockConfig(24, 144, 24, residual=True)
    config = configs.choose(block, configs.without_half(torch.float16), torch.device("cpu")).config
    code = compile_block(block, 56, torch.float16, config, 90, (curve,) * 3)
    # GELU has an erf, whose two polynomials want many registers.
    most = 10 * MOST_SPILL_BYTES if curve == 3 else MOST_SPILL_BYTES
    assert code.spill_bytes <= most or not PINNED


GATED = {
    "stride 2": (BlockConfig(16, 96, 24, stride=2, squeeze_channels=4), "float16"),
    "t1": (BlockConfig(32, 32, 16, expansion=False, squeeze_channels=8), "bfloat16"),
    "1152 channels": (BlockConfig(192, 1152, 320, squeeze_channels=48), "tf32"),
    "no tensor cores": (BlockConfig(24, 144, 24, residual=True, squeeze_channels=6), "float32"),
    "odd": (BlockConfig(17, 961, 3, squeeze_channels=1), "float16"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", GATED)
def test_kernels_around_a_gate_compile(name, architecture):
    block, kind = GATED[name]
    silu, bounds = (2 if block.expansion else 0, 2, 0, 2), (*NO_CLIP,) * 4
    with arithmetic(kind) as dtype:
        config = configs.of_sums(block, dtype, torch.device("cpu"))
        launches = plan_launches(block, (True,) * 5, silu, bounds, 0, (1, 14, 14), config, dtype)
        bound = configs.shared_bytes(block, config, dtype)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        sums, *others = (
            compile_launch(kernel, launch, dtype, options, architecture)
            for kernel, launch, options in (
                (gate.depthwise_sums, launches.sums, options),
                (gate.excitation, launches.excitation, EXCITATION_OPTIONS),
                (gate.gated_projection, launches.projection, PROJECTION_OPTIONS),
            )
        )
    assert sums.metadata.shared <= bound <= configs.SHARED_BYTES
    # What every GPU since compute capability 8.0 has.
    assert all(other.metadata.shared <= 99 * 1024 for other in others)
    if PINNED:
        spilled = [resources(kernel.asm["cubin"])[1] for kernel in (sums, *others)]
        assert max(spilled) <= MOST_SPILL_BYTES
    if kind != "float32":
        assert all("mma.sync" in k.asm["ptx"] or "wgmma" in k.asm["ptx"] for k in others[1:])


@pytest.mark.parametrize("width_mult", (0.35, 0.5, 0.75, 1.0, 1.4))
@pytest.mark.parametrize("shared_bytes", (configs.SHARED_BYTES, 99 * 1024))
def test_rules_keep_their_limits(width_mult, shared_bytes):
    for block in mobilenet_v2_blocks(width_mult):
        for dtype in (torch.float16, torch.float32):
            config = configs.fallback(block, dtype, 7, shared_bytes).config
            assert configs.shared_bytes(block, config, dtype) <= shared_bytes
            assert config.out_tile * config.out_tiles >= block.out_channels or not config.keep_x
