// The table of CPU kernels: one row per instruction set, best first. No torch.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../block.h"
#include "schedule.h"

namespace mnv2::cpu {

// Where the rows of one image are. Memory may hold a few of them only: row r is then where other
// rows with the same r % slots have been.
struct OutputRows {
    void* begin;
    int64_t slots;
    int64_t size;  // bytes from one row to the next

    template <class T>
    T* at(int64_t row) const {
        return reinterpret_cast<T*>(static_cast<char*>(begin) + row % slots * size);
    }
    // Of the rows [row, end), how many follow one another in memory from the first on.
    int64_t run(int64_t row, int64_t end) const { return std::min(end - row, slots - row % slots); }
};

struct InputRows {
    const void* begin;
    int64_t slots, size;
    // Rows before and after these are read from copies, since another thread's result may
    // overwrite them. Both pointers are to where row 0 would be.
    int64_t own_begin = 0, own_end = INT64_MAX;
    const char *before = nullptr, *after = nullptr;

    template <class T>
    const T* at(int64_t row) const {
        const char* const place = row < own_begin ? before + row * size
                                  : row >= own_end
                                      ? after + row * size
                                      : static_cast<const char*>(begin) + row % slots * size;
        return reinterpret_cast<const T*>(place);
    }
    int64_t run(int64_t row, int64_t end) const {
        if (row < own_begin) return std::min(end, own_begin) - row;
        if (row >= own_end) return end - row;
        return std::min(std::min(end, own_end) - row, slots - row % slots);
    }
};

// A piece of one image: a range of output rows, output columns and hidden channels.
struct Tile {
    InputRows x;
    OutputRows y;  // of float32 where the tile does not finish
    int64_t row_begin, row_end;
    int64_t col_begin, col_end;
    int64_t hidden_begin, hidden_end;
    // Where the rows of one step are summed up before they go to y, if y is float32; nullptr: in y
    // itself. y may be x, row for row, where rows are outside and this is not nullptr or y is of
    // another element.
    float* sums;
    bool adds_bias;  // of the first hidden group
    bool finishes;   // clip and residual: there is one hidden group only
    // Of a block with a gate, which is computed in two parts: the depthwise result of the image,
    // chunk after chunk, each (H_out, W_out, channels of the chunk); its sums over the pixels of
    // each step, (steps, hidden channels in whole vectors); and the gate (hidden channels).
    float *kept, *step_sums;
    const float* gate;
};

// The block over one tile. scratch: scratch_layout().total floats, 64-byte aligned.
using TileFn = void (*)(const BlockArgs&, const Schedule&, const Tile&, float* scratch);

// The same in steps, where the schedule has rows outside: begin_tile once, then step_tile for
// output row row_begin and every rows_per_step rows on.
using StepFn = void (*)(const BlockArgs&, const Schedule&, const Tile&, float* scratch,
                        int64_t out_row);

// The two layers of a gate, for the units [begin, end) of each. `means` are those of the hidden
// channels, `squeezed` what the first gives, (width,).
using SqueezeFn = void (*)(const BlockArgs&, const float* means, float* squeezed, int64_t begin,
                           int64_t end);
using ExciteFn = void (*)(const BlockArgs&, const float* squeezed, float* gate, int64_t begin,
                          int64_t end);
// Means over the pixels of an image, of the sums over each of its steps.
using MeansFn = void (*)(const BlockArgs&, const float* step_sums, int64_t steps, float* means);

// y = clip(first + second) + residual over one image; the sums have the layout of y, which `first`
// may be.
using CombineFn = void (*)(const BlockArgs&, const void* x, const float* first, const float* second,
                           void* y);

// The first convolution of a network: 3x3, stride 2, and an activation. x may lie in memory in any
// way.
struct StemArgs {
    int64_t H, W, H_out, W_out, in_channels, out_channels;
    int64_t pad_top, pad_left;
    int64_t row_stride, col_stride, channel_stride;  // of x, elements
    Element element;
    const void* weight;  // (column, row, in_channels, out_channels) of the 3x3 window
    const float* bias;   // nullptr: zeros
    Activation activation;
};

// A 1x1 convolution and an activation. With `averages` the result is the mean over all pixels of an
// image.
struct PointwiseArgs {
    int64_t H, W, in_channels, out_channels;
    bool averages;
    Element element;
    bool pairs;          // as of BlockArgs; in_channels are even then
    const void* weight;  // (in_channels, out_channels)
    const float* bias;   // nullptr: zeros
    Activation activation;
};

// The mean over all pixels of an image.
struct AverageArgs {
    int64_t H, W, channels;
    Element element;
};

constexpr int64_t kPanelChannels = 64;  // output channels of the two above at a time

// Pixels of a 1x1 convolution at a time: all of them where it averages.
constexpr int64_t pixels_at_once(const PointwiseArgs& args) {
    const int64_t pixels = args.H * args.W;
    return args.averages ? pixels : std::min<int64_t>(pixels, 256);
}

struct LinearArgs {
    int64_t in_features, out_features;
    Element element;
    const void* weight;  // (out_features, in_features), as torch.nn.Linear has it
    const float* bias;   // nullptr: zeros
    Activation activation;
};

// One input of an output pixel of the stem: floats from the first input to it, and its weights.
struct StemTerm {
    int64_t offset;
    const float* weight;
};

// Where the pieces of a call's scratch start, in floats. Stem: the terms; for 16-bit inputs also
// three rows of x, the weight and one row of the result as floats. 1x1 convolution: a panel of the
// result; for 16-bit inputs also a panel of the weight, and x converted to float.
struct StemScratch {
    int64_t rows, weight, row, total;
};
struct PointwiseScratch {
    int64_t panel, weight, x, total;
};
StemScratch stem_layout(const StemArgs& stem);
PointwiseScratch pointwise_layout(const PointwiseArgs& args);

// Output rows [begin, end) of one image.
using StemFn = void (*)(const StemArgs&, const void* x, const OutputRows& y, int64_t begin,
                        int64_t end, float* scratch);
// Output channels [begin, end) of one image; begin is a multiple of kPanelChannels.
using PointwiseFn = void (*)(const PointwiseArgs&, const void* x, void* y, int64_t begin,
                             int64_t end, float* scratch);
using AverageFn = void (*)(const AverageArgs&, const void* x, void* y, int64_t begin, int64_t end);
// Output features [begin, end) of a few images: x (images, in_features), y (images, out_features).
using LinearFn = void (*)(const LinearArgs&, int64_t images, const void* x, void* y, int64_t begin,
                          int64_t end);

// Seconds that `rounds` rounds of independent multiply-adds in registers take on this core; each
// is flops_per_round floating-point operations.
using PeakFn = double (*)(int64_t rounds);

// Everything for one kind of element.
struct Layers {
    TileFn run_tile, begin_tile;
    StepFn step_tile;
    // The two parts of a block with a gate: the first in steps, whatever the schedule.
    StepFn keep_step;
    TileFn project_kept;
    MeansFn means;
    SqueezeFn squeeze;
    ExciteFn excite;
    CombineFn combine;
    StemFn stem_rows;
    PointwiseFn pointwise;
    AverageFn average;
    LinearFn linear_rows;
};

struct Kernel {
    const char* name;        // as in ATEN_CPU_CAPABILITY, but for neon
    const char* capability;  // what at::get_cpu_capability() must say at least
    int64_t lanes;
    Layers single, half, bfloat16;
    bool (*has_pairs)();  // AVX512-BF16
    PeakFn time_fma;
    int64_t flops_per_round;

    const Layers& of(Element element) const {
        return element == Element::single ? single : element == Element::half ? half : bfloat16;
    }

    // Whether bfloat16 numbers are multiplied two at a time, where a layer allows it: if the CPU
    // has instructions for that and they are faster than those for floats, or MNV2_BFLOAT16_PAIRS
    // asks for them.
    bool multiplies_pairs() const;
    // The same of these layers.
    bool multiplies_pairs(const BlockArgs& args) const;
    bool multiplies_pairs(const PointwiseArgs& args) const;
};

extern const Kernel* const kKernels[];
extern const int kKernelCount;

// The best kernel for a capability string of ATen ("AVX512", "AVX2", anything else: generic).
const Kernel& select_kernel(const char* capability);

// True where a CPU of this capability can run the kernel.
bool runs_on(const Kernel& kernel, const char* capability);

#if defined(__x86_64__)
extern const Kernel kAvx512Kernel, kAvx2Kernel;
#endif
#if defined(__aarch64__)
extern const Kernel kNeonKernel;
#else
extern const Kernel kGenericKernel;
#endif

}  // namespace mnv2::cpu
