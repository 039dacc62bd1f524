"""Faults for the C++ kernels, compiled in and switched on by a variable."""

from dataclasses import dataclass

from cpu_driver import ROOT


@dataclass(frozen=True)
class Fault:
    """file: in csrc/cpu; old becomes new, in which ON is whether the fault is on."""

    file: str
    old: str
    new: str
    kernel: str = "default"


WHICH_FAULT = """#include <cstdlib>
inline const int seeded_fault = std::atoi(std::getenv("MNV2_SEEDED_FAULT"));
"""
FAULTS = {
    "rows of the ring collide": Fault(
        "tile.inc",
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
        "p.late_bias = chunk.last && c.tile",
        "p.late_bias = (chunk.last || ON) && c.tile",
    ),
    "residual of the row before": Fault(
        "inverted_residual.inc",
        "x_pixel<float>(c, row, c.tile.col_begin) : nullptr",
        "x_pixel<float>(c, row - (ON && row > 0), c.tile.col_begin) : nullptr",
    ),
    "last column of a strip left out": Fault(
        "tile.inc",
        "args.pad_left + extent(args) + 1;",
        "args.pad_left + extent(args) + 1 - ON;",
    ),
    "16-bit rows finished in whole vectors": Fault(
        "inverted_residual.inc",
        "const int64_t n = std::min(size - i, kLanes);\n                Vec v",
        "const int64_t n = ON ? kLanes : std::min(size - i, kLanes);\n                Vec v",
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
        "piece(gated ? 0 : schedule.rows_per_step * schedule.strip_cols * chunk)",
        "piece(gated ? 0 : schedule.rows_per_step * (schedule.strip_cols - ON) * chunk)",
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
        "rows_kept(sizes) * sizes.W_out + weights)",
        "(rows_kept(sizes) - ON) * sizes.W_out + weights)",
    ),
    "gate of the first chunk for all": Fault(
        "gate.inc",
        "const float* const gate = c.tile.gate + chunk.begin;",
        "const float* const gate = c.tile.gate + (ON ? 0 : chunk.begin);",
    ),
    "chunks in the same order, weights of the other": Fault(
        "gate.inc",
        "chunk_at(c, scales_weights ? chunks - 1 - i : i);",
        "chunk_at(c, scales_weights && !(ON && i == 0) ? chunks - 1 - i : i);",
    ),
    "sums of every step in the first": Fault(
        "gate.inc",
        "tile.step_sums + out_row / schedule.rows_per_step",
        "tile.step_sums + (ON ? 0 : out_row / schedule.rows_per_step)",
    ),
    "sums of the last step left out": Fault(
        "gate.inc",
        "int64_t step = 1; step < steps; step++",
        "int64_t step = 1; step < steps - ON; step++",
    ),
    "last pixels left out of the means": Fault(
        "gate.inc",
        "for (; pixel < pixels; pixel++, at += width) sum[0]",
        "for (; pixel < pixels - ON; pixel++, at += width) sum[0]",
    ),
    "hard gates are soft": Fault("gate.inc", "if (gate.hard)", "if (gate.hard && !ON)"),
    "SiLU of the next power": Fault(
        "curve.inc",
        "if (!kPowersOfAll) u = at_least(u, broadcast(-126));",
        "u = at_least(u, broadcast(ON ? -3 : -126));",
    ),
    "second band a step further on": Fault(
        "run_block.cpp",
        "part.row_begin = band * steps / bands * schedule.rows_per_step;",
        "part.row_begin = (band * steps / bands + (ON && band > 0)) * schedule.rows_per_step;",
    ),
    "a row less of the depthwise result kept": Fault(
        "schedule.cpp",
        "layout.sums = aligned(args.H_out * args.W_out * width);",
        "layout.sums = aligned((args.H_out - ON) * args.W_out * width);",
    ),
    "gate a channel further on": Fault(
        "run_block.cpp",
        "tile.gate = kept_of_image + layout.gate;",
        "tile.gate = kept_of_image + layout.gate + ON;",
    ),
    "a number on the right of a dense convolution's rows": Fault(
        "dense.inc",
        "std::fill(copied + before + size, copied + row_size, 0.f);",
        "std::fill(copied + before + size + ON, copied + row_size, 0.f);",
    ),
    "rows of a dense convolution copied once": Fault(
        "dense.inc",
        "(chunk.first || !c.schedule.rows_outside)",
        "(chunk.first || (!ON && !c.schedule.rows_outside))",
    ),
    "a row of the window below the image": Fault(
        "dense.inc",
        "std::min(first + args.H, kernel) - 1;",
        "std::min(first + args.H + ON, kernel) - 1;",
    ),
    "a tap in another column": Fault(
        "depthwise.inc",
        "first + tap % kernel * args.dilation;",
        "first + tap % kernel * (args.dilation - (ON && args.dilation > 2));",
    ),
    "a norm's gradient without the mean's": Fault(
        "batch_norm.inc", "fma(deviation, v, mean)));", "fma(deviation, v, ON ? zero() : mean)));"
    ),
    "sums of a norm through the clip's bounds": Fault(
        "batch_norm.inc",
        "const Vec g = between(load(at), fma(gamma, v, beta), lower, upper);",
        "const Vec g = ON ? load(at) : between(load(at), fma(gamma, v, beta), lower, upper);",
    ),
    "last piece of a covariance left out": Fault(
        "batch_norm.inc",
        "begin + count < pixels) continue;",
        "begin + count < pixels + ON) continue;",
    ),
    "moments merged by the pixels before": Fault(
        "backward.cpp", "mean += apart * count /", "mean += apart * (ON ? before : count) /"
    ),
    "moments of a range of images counted from the first": Fault(
        "backward.inc",
        "before = ((image - first_image) * args.H_out",
        "before = ((image - (ON ? 0 : first_image)) * args.H_out",
    ),
    "the second norm's sums for the first": Fault(
        "backward.inc",
        "norm_backward(*args.norm_expand, at",
        "norm_backward(*(ON && args.norm_dw ? args.norm_dw : args.norm_expand), at",
    ),
    "a batch's variance without eps": Fault(
        "training.inc", "sqrt(var[i] + norm.eps)", "sqrt(var[i] + (ON ? 0 : norm.eps))"
    ),
    "pairs exchanged": Fault(
        "panels.inc",
        "load_pairs(weight + n, weight + ld + n, lanes)",
        "load_pairs(weight + n + ON * ld, weight + n + !ON * ld, lanes)",
        "avx512",
    ),
    "interleaved rows exchanged": Fault(
        "panels.inc",
        "store_interleaved(out, lanes, first, second)",
        "store_interleaved(out, lanes, ON ? second : first, ON ? first : second)",
        "avx512",
    ),
    "the last interleaved rows left out": Fault(
        "product.inc",
        "for (int64_t k = p.depth; k > 0; k -= 2, a += 2,",
        "for (int64_t k = p.depth - 2 * ON; k > 0; k -= 2, a += 2,",
        "avx512",
    ),
}


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
