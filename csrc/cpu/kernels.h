// The table of CPU kernels: one row per instruction set, best first. No torch.
#pragma once
#include <cstdint>

#include "../block.h"
#include "schedule.h"

namespace mnv2::cpu {

// A piece of one image: a range of output rows, output columns and hidden channels.
struct Tile {
    int64_t image;
    int64_t row_begin, row_end;
    int64_t col_begin, col_end;
    int64_t hidden_begin, hidden_end;
    // Where the projection is summed up: rows of W_out pixels of out_channels, from row 0 of the
    // image. Not y itself for all hidden groups but the first.
    float* sums;
    bool starts_with_bias;  // of the first hidden group
    bool finishes;          // clip and residual: there is one hidden group only
};

// The block over one tile. scratch: scratch_layout().total floats, 64-byte aligned.
using TileFn = void (*)(const BlockArgs&, const Schedule&, const Tile&, float* scratch);

// y = clip(y + partial) + residual over one image; partial has the layout of that image of y.
using CombineFn = void (*)(const BlockArgs&, const float* partial, int64_t image);

// Seconds that `rounds` rounds of independent multiply-adds in registers take on this core; each
// is flops_per_round floating-point operations.
using PeakFn = double (*)(int64_t rounds);

struct Kernel {
    const char* name;        // as in ATEN_CPU_CAPABILITY
    const char* capability;  // what at::get_cpu_capability() must say at least
    int64_t lanes;
    TileFn run_tile;
    CombineFn combine;
    PeakFn time_fma;
    int64_t flops_per_round;
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
extern const Kernel kGenericKernel;

}  // namespace mnv2::cpu
