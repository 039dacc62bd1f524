"""One fault in the C++ kernels must be found in at least two independent ways.

Every fault is a text of the source and what stands there instead while it is on; the text must
occur exactly once, so that a fault that no longer applies is an error, not a pass. All are compiled
into one program, which an environment variable tells the fault that it has. Its memory is between
pages that cannot be touched; the long run has it under AddressSanitizer too.

The ways are rows of matrix.py. What the driver does for each is here a few small calls: the
values of listed blocks (T1), of random ones (T5) and of networks (T5-plan) against float64,
gradients (T9), places of NaN (T10), bytes beside memory (T12), pages (T13), the sanitizer (T14),
and bits at another number of threads or with streams (T18).
"""

from pathlib import Path

import cpu_driver
import pytest
from cases import LONG, Case
from cpu_driver import ADDRESS, line_of
from seeded_faults import FAULTS, seeded_texts

from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig

PLAIN = ("-O1", "-g1")
WHY_NOT = cpu_driver.why_not(ADDRESS)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(1200),
]


# The pages end a call of these before any value is wrong; the sanitizer sees them too.
NEED_THE_SANITIZER = {
    "tail lanes read whole",
    "tail of the taps read whole",
    "scratch of gradients a row short",
    "every second result of a network further on",
}

T1 = BlockConfig(16, 16, 12, 1, False)
CASES = [
    Case(BlockConfig(5, 19, 5, residual=True), 9, 8),
    Case(BlockConfig(8, 70, 13, 2, padding=(0, 0, 1, 1)), 8, 11),
    Case(BlockConfig(12, 48, 12, kernel_size=5, padding=(2,) * 4, residual=True), 15, 17),
    Case(BlockConfig(24, 144, 24, residual=True), 14, 13, clips=(RELU6,) * 3),
    Case(BlockConfig(160, 960, 33), 7, 7),
    Case(BlockConfig(9, 37, 11, dilation=2, padding=(0,) * 4), 9, 6, clips=(NO_CLIP,) * 3),
    Case(T1, 11, 9),
    Case(BlockConfig(13, 13, 12, 2, False), 7, 7),
    Case(BlockConfig(8, 48, 8, residual=True, padding=(2, 2, 0, 0)), 7, 10),
    Case(BlockConfig(16, 96, 24, padding=(0,) * 4), 20, 303),
]


def lines_of_cases() -> list[str]:
    """Every case in all dtypes, with a NaN in some of them."""
    blocks = [(case, dtype) for dtype in cpu_driver.ELEMENTS for case in CASES]
    return [line_of(case, dtype, i) for i, (case, dtype) in enumerate(blocks)]


# Which row finds what, by the driver's calls: its values and NaN, and what any call may show.
OF_CALLS = {
    ("cases",): {"numbers": "T1", "NaN": "T10"},
    ("networks",): {"numbers": "T5-plan", "NaN": "T5-plan"},
    ("random", "5", "60"): {"numbers": "T5", "NaN": "T5"},
    ("backward",): {"numbers": "T9", "NaN": "T9"},
}
OF_ANY = {
    "margins": "T12",
    "SIGSEGV": "T13",
    "SIGBUS": "T13",
    "address": "T14",
    "undefined": "T14",
    "bits": "T18",
}


def rows_that_find(number: int, flags: tuple[str, ...], kernel: str = "default") -> set[str]:
    """Of the matrix, by a driver with these flags; number: that of the fault, 0 for none."""
    driver = cpu_driver.build([kernel], flags, seeded_texts())
    found = set()
    for arguments, rows in OF_CALLS.items():
        lines = lines_of_cases() if arguments == ("cases",) else ()
        outcome = cpu_driver.run(
            driver, kernel, *arguments, cases=lines, MNV2_SEEDED_FAULT=str(number)
        )
        found |= {(rows | OF_ANY)[kind] for kind in outcome.found}
    return found


@pytest.mark.parametrize(
    "flags", (PLAIN, ADDRESS) if LONG else (PLAIN,), ids=lambda flags: flags[-1]
)
def test_nothing_is_found_where_nothing_is(flags):
    assert rows_that_find(0, flags) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name, record_property):
    """By two rows; in the short run by those that need no sanitizer, which may be one."""
    number, kernel = list(FAULTS).index(name) + 1, FAULTS[name].kernel
    if kernel not in cpu_driver.kernels_here():
        pytest.skip(f"no {kernel} here")
    if kernel != "default" and not LONG:
        pytest.skip(f"compiles {kernel} once more: MNV2_LONG=1")
    if name == "pairs exchanged" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor multiplies no pairs")
    found = rows_that_find(number, PLAIN, kernel)
    if LONG and kernel == "default":
        found |= rows_that_find(number, ADDRESS)
    record_property("found by", " ".join(sorted(found)))
    assert len(found) >= (1 if name in NEED_THE_SANITIZER and not LONG else 2), found
