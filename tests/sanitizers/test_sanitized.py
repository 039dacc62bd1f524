"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, every access of theirs.

cpu_alone/driver.cpp has every tensor on the heap at its exact size, and shows the sanitizer what
masked instructions touch. Every tensor is aligned to its elements alone in half of the calls.
test_sanitized_extension.py does the same for the code between these kernels and torch, and
test_cuda_memory.py for the CUDA kernels on the emulator.
"""

import re
from pathlib import Path

import cases
import cpu_driver
import pytest
from cases import DTYPES, LONG
from cpu_driver import ADDRESS, ROOT, line_of

WHY_NOT = cpu_driver.why_not(ADDRESS)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(1200),
]
# The long run takes every kernel of this machine, the short one the last, which compiles in half
# the time of the best.
KERNELS = cpu_driver.kernels_here()[0 if LONG else -1 :]


def run(kernel: str, *arguments: str, lines: list[str] | None = None) -> cpu_driver.Outcome:
    driver = cpu_driver.build([kernel], ADDRESS)
    return cpu_driver.run(driver, kernel, *arguments, cases=lines or ())


def check(outcome: cpu_driver.Outcome, least: int) -> None:
    assert not outcome.found, (outcome.printed[-500:], outcome.errors[:3000])
    assert outcome.counts["calls"] >= least


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shapes_of_every_backend(kernel, dtype):
    """S1 to S4; full resolution, and all of them in 16 bits, in the long run."""
    lines = []
    for name, group in cases.groups().items():
        if name == "S1-full" and not LONG:
            continue
        step = 1 if LONG else 3 if dtype == DTYPES[0] else 9
        lines += [line_of(case, dtype, i) for i, case in enumerate(group[::step])]
    check(run(kernel, "cases", lines=lines), 2 * len(lines))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("what, least", [("blocks", 1500), ("networks", 60), ("backward", 250)])
def test_blocks_networks_and_gradients(kernel, what, least):
    check(run(kernel, what), least)


@pytest.mark.parametrize("kernel", KERNELS)
def test_random_blocks_and_gradients(kernel):
    count = 3000 if LONG else 120
    check(run(kernel, "random", "1", str(count)), 2 * count)


@pytest.mark.parametrize(
    "fault, kind", [("overrun", "address"), ("masked", "address"), ("overflow", "undefined")]
)
def test_the_sanitizers_catch(fault, kind):
    assert run(KERNELS[0], fault).found == {kind}


def test_the_sanitizer_is_shown_every_masked_access():
    masked = r"_mm\d+_\w*mask\w*(?:load|store)\w*"
    shown = (ROOT / "tests/cpu_alone/masked_lanes.h").read_text()
    used = set()
    for path in Path(ROOT, "csrc/cpu").rglob("*.*"):
        used |= set(re.findall(masked, path.read_text()))
    assert len(used) >= 6
    assert used == set(re.findall(rf"#define ({masked})\(", shown))
