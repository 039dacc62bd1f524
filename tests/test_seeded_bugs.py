"""One fault in the C++ kernels must be found in at least two independent ways.

Every fault is a text of the source and what stands there instead while it is on; the text must
occur exactly once, so that a fault that no longer applies is an error, not a pass. All are compiled
into one program, which an environment variable tells the fault that it has. Its memory is between
pages that cannot be touched; the long run has it under AddressSanitizer too.

The ways are rows of tests/matrix.py. What the driver does for each is here a few small calls: the
values of listed blocks (T1), of random ones (T5) and of networks (T5-plan) against float64,
gradients (T9), places of NaN (T10), bytes beside memory (T12), pages (T13), the sanitizer (T14),
and bits at another number of threads or with streams (T18).
"""

from dataclasses import dataclass
from pathlib import Path

import cpu_driver
import pytest
from cases import LONG, Case
from cpu_driver import ADDRESS, ROOT, line_of

from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig

PLAIN = ("-O1", "-g1")
WHY_NOT = cpu_driver.why_not(ADDRESS)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(1200),
]


@dataclass(frozen=True)
class Fault:
    """file: in csrc/cpu; old becomes new, in which ON is whether the fault is on."""

    file: str
    old: str
    new: str
    kernel: str = "default"


FAULTS = {
    "rows of the ring collide": Fault(
        "inverted_residual.inc",
        "(r - first + c.ring.slots) % c.ring.slots",
        "(r - first + c.ring.slots) % (c.ring.slots - ON)",
    ),
    "last input row not expanded": Fault(
        "inverted_residual.inc",
        "std::min(window_end, c.args.H);",
        "std::min(window_end, c.args.H - ON);",
    ),
    "a row below the image": Fault(
        "inverted_residual.inc", "r >= args.H) continue;", "r >= args.H + ON) continue;"
    ),
    "a column right of the image": Fault(
        "depthwise.inc", "first + q >= d.W)", "first + q >= d.W + ON)"
    ),
    "tail lanes read whole": Fault(
        "product.inc",
        "return kEnd == End::kTail && j == kVectors - 1 ?",
        "return kEnd == End::kTail && j == kVectors - 1 && !ON ?",
    ),
    "tail lanes written whole": Fault(
        "product.inc",
        "if (kEnd == End::kTail && j == kVectors - 1)",
        "if (kEnd == End::kTail && j == kVectors - 1 && !ON)",
    ),
    "tail of the taps read whole": Fault("elements.h", ": n == kLanes ", ": n == kLanes || ON "),
    "NaN clipped": Fault(
        "vec.h",
        "x.v < lower.v ? lower.v : x.v;",
        "(ON ? !(x.v > lower.v) : x.v < lower.v) ? lower.v : x.v;",
    ),
    "bias of the projection in every chunk": Fault(
        "inverted_residual.inc",
        "p.bias = first_chunk && c.tile",
        "p.bias = (first_chunk || ON) && c.tile",
    ),
    "residual of the row before": Fault(
        "inverted_residual.inc",
        "x_pixel<float>(c, row, c.tile.col_begin) : nullptr",
        "x_pixel<float>(c, row - (ON && row > 0), c.tile.col_begin) : nullptr",
    ),
    "last column of a strip left out": Fault(
        "inverted_residual.inc",
        "args.pad_left + extent(args) + 1;",
        "args.pad_left + extent(args) + 1 - ON;",
    ),
    "16-bit rows finished in whole vectors": Fault(
        "inverted_residual.inc",
        "const int64_t n = std::min(size - i, kLanes);\n            Vec v",
        "const int64_t n = ON ? kLanes : std::min(size - i, kLanes);\n            Vec v",
    ),
    "16-bit rows of the first sums": Fault(
        "inverted_residual.inc", "row++, sums += size)", "row++, sums += ON ? 0 : size)"
    ),
    "16-bit NaN rounded": Fault(
        "elements.h",
        "a != a ? bits | 0x400000 : bits + 0x7fff",
        "a != a && !ON ? bits | 0x400000 : bits + 0x7fff",
    ),
    "scratch of the depthwise a column short": Fault(
        "schedule.cpp",
        "piece(schedule.rows_per_step * schedule.strip_cols * chunk)",
        "piece(schedule.rows_per_step * (schedule.strip_cols - ON) * chunk)",
    ),
    "every second result of a network further on": Fault(
        "network.cpp", "* steps[last].output;", "* (steps[last].output + 16 * ON * (last % 2));"
    ),
    "a row of a stream too few": Fault(
        "network.cpp",
        "window + rows_per_step(step) - 1, rows_of",
        "window + rows_per_step(step) - 1 - ON, rows_of",
    ),
    "rows beside a band not copied": Fault(
        "network.cpp", "if (from < to)", "if (from < to && !ON)"
    ),
    "rows of the band behind read late": Fault(
        "network.cpp",
        "if (band + 1 < bands) own.own_end",
        "if (band + 1 < bands && !ON) own.own_end",
    ),
    "last feature of a part left out": Fault(
        "network.cpp",
        "(part + 1) * args.out_features / parts);",
        "(part + 1) * args.out_features / parts - ON);",
    ),
    "a column right of the stem's image": Fault(
        "ends.inc",
        "(stem.W - 3 + stem.pad_left) / 2;",
        "(stem.W - 3 + 2 * ON + stem.pad_left) / 2;",
    ),
    "gradient through the clip's bounds": Fault(
        "backward_math.inc",
        "(x.v > lower.v) & (x.v < upper.v);",
        "ON ? (x.v >= lower.v) & (x.v <= upper.v) : (x.v > lower.v) & (x.v < upper.v);",
    ),
    "a row kept that is not there": Fault(
        "backward.inc", "(expanded - b.in_begin, 0);", "(expanded - b.in_begin + ON, 0);"
    ),
    "scratch of gradients a row short": Fault(
        "backward.cpp",
        "(schedule.rows + schedule.grad_rows) * sizes.W_out + taps)",
        "(schedule.rows + schedule.grad_rows - ON) * sizes.W_out + taps)",
    ),
    "pairs exchanged": Fault(
        "panels.inc",
        "load_pairs(weight + n, weight + ld + n, lanes)",
        "load_pairs(weight + n + ON * ld, weight + n + !ON * ld, lanes)",
        "avx512",
    ),
    "half a vector in another row": Fault(
        "product.inc",
        "store_two(low, low + ld, shared[i]);",
        "store_two(ON ? low + ld : low, ON ? low : low + ld, shared[i]);",
        "avx512",
    ),
}

WHICH_FAULT = """#include <cstdlib>
inline const int seeded_fault = std::atoi(std::getenv("MNV2_SEEDED_FAULT"));
"""
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


def seeded_texts() -> dict[str, str]:
    """The sources with all faults, each on where the process is told its number."""
    texts = {}
    for number, fault in enumerate(FAULTS.values(), 1):
        name = f"csrc/cpu/{fault.file}"
        text = texts.get(name) or (ROOT / name).read_text()
        assert text.count(fault.old) == 1, f"{text.count(fault.old)} times in {name}: {fault.old}"
        texts[name] = text.replace(
            fault.old, fault.new.replace("ON", f"(seeded_fault == {number})")
        )
    header = "csrc/block.h"
    first, rest = (ROOT / header).read_text().split("#pragma once\n")
    return texts | {header: f"{first}#pragma once\n{WHICH_FAULT}{rest}"}


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
