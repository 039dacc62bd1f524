"""The CUDA kernels compiled for GPUs that are not here: registers, spills, instructions.

The budget holds what one version of nvcc makes of every instance; it may only fall.
`python -m benchmarks.machine_code.cuda_code --budget tests/cuda/cuda_budget.json` writes it anew.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from cases import LONG

from benchmarks.machine_code import cuda_code
from benchmarks.machine_code.cuda_code import ARCHITECTURES, codes_of, sources
from benchmarks.machine_code.read import opcode, read_listing

BUDGET = json.loads((Path(__file__).parent / "cuda_budget.json").read_text())
MOST_SPILL_BYTES = 64
WHY_NOT = cuda_code.why_not()
needs_nvcc = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
needs_cxxfilt = pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")


def test_every_file_has_a_budget():
    assert list(BUDGET["rows"]) == [path.name for path in sources()]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES[0 if LONG else -1 :])
@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
def test_budget(source, architecture):
    codes, rows = codes_of(source, architecture), BUDGET["rows"][source.name]
    assert set(codes) == set(rows)
    over = []
    for name, code in codes.items():
        allowed = {key: float("inf") for key in code.figures()}
        if cuda_code.nvcc_version() == BUDGET["nvcc"]:
            allowed = dict(rows[name][f"sm_{architecture}"])
        allowed["spill_stores"] = min(allowed["spill_stores"], MOST_SPILL_BYTES)
        over += [
            f"{name}: {key} {figure}, allowed {allowed[key]}"
            for key, figure in code.figures().items()
            if figure > allowed[key]
        ]
    assert not over, "\n".join(over)


@needs_nvcc
def test_instructions_of_block_3():
    """24-144-24 at stride 1 in fp16: 4.5 multiply-adds of pairs, and not much else."""
    codes = codes_of(cuda_code.SOURCES / "patch/patch.cu", 90)
    instance = "inverted_residual_patch<__half, PatchSizes<true, true, 24, 24, 1, 4, 4>, "
    (code,) = (code for name, code in codes.items() if name.startswith(instance))
    # Nine taps of 64 hidden outputs a lane, two in an instruction.
    assert code.loop["HFMA2"] >= 9 * 64 / 2
    assert code.per_hidden_output == code.loop.total() / 64 <= 10
    assert code.spill_stores <= 32 and code.spill_loads <= 32


LISTING = """
.text._Zkernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
.L_x_2:
        /*0020*/                   LDS R1, [R0] ;
.L_x_0:
        /*0030*/                   FFMA.FTZ R2, R1, R1, R2 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   LDS R1, [R0] ;
        /*0060*/                   LDS R3, [R0+0x4] ;
        /*0070*/                   HFMA2.MMA R2, R1, R1, R2 ;
        /*0080*/              @UP0 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   IADD3 R0, R0, 0x4, RZ ;
        /*00a0*/                   IADD3 R0, R0, 0x4, RZ ;
        /*00b0*/                   IADD3 R0, R0, 0x4, RZ ;
        /*00c0*/                   STS [R0], R2 ;
        /*00d0*/               @P1 BRA `(.L_x_3) ;
        /*00e0*/               @P1 BRA `(.L_x_2) ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""


def test_loops_of_a_listing():
    listing = read_listing(LISTING)
    assert len(listing.instructions) == 16
    assert [opcode(i) for i in listing.instructions[1:4]] == ["EXIT", "LDS", "FFMA"]
    assert len(listing.longest_loop()) == 13
    # Not the one around it, not the longer one without multiply-adds, not the shorter one.
    assert Counter(map(opcode, listing.busiest_loop())) == {"LDS": 2, "HFMA2": 1, "BRA": 1}


def test_listing_without_loops():
    listing = read_listing(
        "        /*0000*/    FFMA R1, R2, R3, R4 ;\n        /*0010*/    EXIT ;\n"
    )
    assert listing.longest_loop() == listing.busiest_loop() == listing.instructions
    assert len(listing.instructions) == 2


@needs_cxxfilt
def test_names_of_instances():
    mangled = (
        "_ZN4mnv24cuda40_GLOBAL__N__0123abcd_8_patch_cu_4567cdef23inverted_residual_patch"
        "I6__halfNS0_10PatchSizesILb1ELb1ELi24ELi24ELi1ELi4ELi4EEELi2EEEvNS1_9PatchCallE"
    )
    name = "inverted_residual_patch<__half, PatchSizes<true, true, 24, 24, 1, 4, 4>, 2>"
    assert cuda_code.instance_names([mangled]) == {mangled: name}
