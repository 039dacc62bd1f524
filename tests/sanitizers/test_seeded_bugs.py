"""One fault in the C++ kernels must be found in at least two independent ways.

Every fault is a text of the source and the text that replaces it while it is on; the text must
occur exactly once, so that a fault that no longer applies is an error, not a pass. All are compiled
into one program, which an environment variable tells the fault that it has. Its memory is between
pages that cannot be touched; the long run has it under AddressSanitizer too.

The ways are the other tests', each with a few small calls: the values of listed blocks, of
random ones and of networks against float64, gradients, places of NaN, bytes outside memory, guard
pages, the sanitizer, and the same bits at another number of threads or with streams.
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
    pytest.mark.sampled(4),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(1200),
]


# The pages end a call of these before any value is wrong; the sanitizer sees them too.
NEED_THE_SANITIZER = {
    "tail lanes read whole",
    "tail of the taps read whole",
    "scratch of gradients a row short",
    "every second result of a network further on",
    "a row less of the depthwise result kept",
}

CASES = [
    Case(BlockConfig(5, 19, 5, residual=True), 9, 8),
    Case(BlockConfig(8, 70, 13, 2, padding=(0, 0, 1, 1)), 8, 11),
    Case(BlockConfig(12, 48, 12, kernel_size=5, padding=(2,) * 4, residual=True), 15, 17),
    Case(BlockConfig(24, 144, 24, residual=True), 14, 13, clips=(RELU6,) * 3),
    Case(BlockConfig(160, 960, 33), 7, 7),
    Case(BlockConfig(9, 37, 11, dilation=2, padding=(0,) * 4), 9, 6, clips=(NO_CLIP,) * 3),
    Case(BlockConfig(16, 16, 12, 1, False), 11, 9),
    Case(BlockConfig(13, 13, 12, 2, False), 7, 7),
    Case(BlockConfig(8, 48, 8, residual=True, padding=(2, 2, 0, 0)), 7, 10),
    Case(BlockConfig(16, 96, 24, padding=(0,) * 4), 20, 303),
]


def lines_of_cases() -> list[str]:
    """Every case in all dtypes, with a NaN in some of them."""
    blocks = [(case, dtype) for dtype in cpu_driver.ELEMENTS for case in CASES]
    return [line_of(case, dtype, i) for i, (case, dtype) in enumerate(blocks)]


# What finds a fault, by the driver's calls: their values and NaN, and what any call may show.
OF_CALLS = {
    ("cases",): {"numbers": "values of blocks", "NaN": "places of NaN"},
    ("networks",): {"numbers": "networks", "NaN": "networks"},
    ("random", "5", "60"): {"numbers": "random blocks", "NaN": "random blocks"},
    ("backward",): {"numbers": "gradients", "NaN": "gradients"},
}
OF_ANY = {
    "margins": "bytes beside memory",
    "SIGSEGV": "guard pages",
    "SIGBUS": "guard pages",
    "address": "sanitizer",
    "undefined": "sanitizer",
    "bits": "same bits",
}


def ways_that_find(number: int, flags: tuple[str, ...], kernel: str = "default") -> set[str]:
    """By a driver with these flags; number: the fault's, 0 for none."""
    driver = cpu_driver.build([kernel], flags, seeded_texts())
    found = set()
    for arguments, ways in OF_CALLS.items():
        lines = lines_of_cases() if arguments == ("cases",) else ()
        outcome = cpu_driver.run(
            driver, kernel, *arguments, cases=lines, MNV2_SEEDED_FAULT=str(number)
        )
        found |= {(ways | OF_ANY)[kind] for kind in outcome.found}
    return found


@pytest.mark.parametrize(
    "flags", (PLAIN, ADDRESS) if LONG else (PLAIN,), ids=lambda flags: flags[-1]
)
def test_nothing_is_found_where_nothing_is(flags):
    assert ways_that_find(0, flags) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name):
    """In two ways; in the short run by those that need no sanitizer, which may be one."""
    number, kernel = list(FAULTS).index(name) + 1, FAULTS[name].kernel
    if kernel not in cpu_driver.kernels_here():
        pytest.skip(f"no {kernel} here")
    if kernel != "default" and not LONG:
        pytest.skip(f"compiles {kernel} once more: MNV2_LONG=1")
    if name == "pairs exchanged" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor multiplies no pairs")
    found = ways_that_find(number, PLAIN, kernel)
    if LONG and kernel == "default":
        found |= ways_that_find(number, ADDRESS)
    assert len(found) >= (1 if name in NEED_THE_SANITIZER and not LONG else 2), found
