#include "kernels.h"

#include <cstring>

namespace mnv2::cpu {

const Kernel* const kKernels[] = {
#if defined(__x86_64__)
    &kAvx512Kernel,  // Intel Skylake-X and later servers, AMD Zen 4 and later
    &kAvx2Kernel,    // Intel Haswell and later, AMD Zen
#endif
#if defined(__aarch64__)
    &kNeonKernel,  // all of them, whatever else ATen finds
#else
    &kGenericKernel,  // every x86-64 (SSE2)
#endif
};
const int kKernelCount = sizeof kKernels / sizeof *kKernels;

// The table is ordered, so a capability runs its own row and all rows below it.
static int row_of(const char* capability) {
    for (int i = 0; i < kKernelCount; i++)
        if (std::strcmp(kKernels[i]->capability, capability) == 0) return i;
    return kKernelCount - 1;
}

const Kernel& select_kernel(const char* capability) { return *kKernels[row_of(capability)]; }

bool runs_on(const Kernel& kernel, const char* capability) {
    return row_of(kernel.capability) >= row_of(capability);
}

bool Kernel::multiplies_pairs(const BlockArgs& args) const {
    const bool even = args.hidden_channels % 2 == 0 && args.in_channels % 2 == 0;
    return args.element == Element::bfloat16 && even && has_pairs();
}

bool Kernel::multiplies_pairs(const PoolArgs& pool) const {
    return pool.element == Element::bfloat16 && pool.in_channels % 2 == 0 && has_pairs();
}

static int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

StemScratch stem_layout(const StemArgs& stem) {
    const bool narrow = stem.element != Element::single;
    StemScratch layout{};
    layout.rows = aligned(9 * stem.in_channels * sizeof(StemTerm) / sizeof(float));
    layout.weight = layout.rows + (narrow ? aligned(3 * stem.W * stem.in_channels) : 0);
    layout.row = layout.weight + (narrow ? aligned(9 * stem.in_channels * stem.out_channels) : 0);
    layout.total = layout.row + (narrow ? aligned(stem.W_out * stem.out_channels) : 0);
    return layout;
}

PoolScratch pool_layout(const PoolArgs& pool) {
    const bool narrow = pool.element != Element::single && pool.weight != nullptr;
    const int64_t in_memory = pool.pairs ? 2 : 1;  // numbers in the place of a float
    const int64_t pixels = pool.averages ? pool.H * pool.W : std::min(pool.H * pool.W, kPoolPixels);
    PoolScratch layout{};
    layout.weight = narrow || pool.averages ? pixels * kPoolPanel : 0;
    layout.x = layout.weight + (narrow ? pool.in_channels / in_memory * kPoolPanel : 0);
    layout.total = layout.x + (narrow && !pool.pairs ? aligned(pixels * pool.in_channels) : 0);
    return layout;
}

}  // namespace mnv2::cpu
