#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "sizes.h"

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

// One answer a process. AMD's cores multiply bfloat16 numbers at twice the rate of floats, Intel's
// at half of it (measured on Zen 4 and Emerald Rapids).
static bool pairs_are_wanted() {
    static const bool wanted = [] {
        const char* const asked = std::getenv("MNV2_BFLOAT16_PAIRS");
        if (asked && *asked) return *asked == '1';
#if defined(__x86_64__)
        return __builtin_cpu_is("amd") != 0;
#else
        return false;
#endif
    }();
    return wanted;
}

bool Kernel::multiplies_pairs() const { return has_pairs() && pairs_are_wanted(); }

bool Kernel::multiplies_pairs(const BlockArgs& args) const {
    const bool even = args.hidden_channels % 2 == 0 && args.in_channels % 2 == 0;
    // Pairs come from the depthwise, before a curve or a gate.
    const bool plain = args.curve_dw == Curve::clip && args.gate.width == 0 && !args.dense;
    return args.element == Element::bfloat16 && even && plain && multiplies_pairs();
}

bool Kernel::multiplies_pairs(const PointwiseArgs& args) const {
    return args.element == Element::bfloat16 && args.in_channels % 2 == 0 && multiplies_pairs();
}

StemScratch stem_layout(const StemArgs& stem) {
    const bool narrow = stem.element != Element::single;
    StemScratch layout{};
    layout.rows = aligned(9 * stem.in_channels * sizeof(StemTerm) / sizeof(float));
    layout.weight = layout.rows + (narrow ? aligned(3 * stem.W * stem.in_channels) : 0);
    layout.row = layout.weight + (narrow ? aligned(9 * stem.in_channels * stem.out_channels) : 0);
    layout.total = layout.row + (narrow ? aligned(stem.W_out * stem.out_channels) : 0);
    return layout;
}

PointwiseScratch pointwise_layout(const PointwiseArgs& args) {
    const bool narrow = args.element != Element::single;
    const int64_t in_memory = args.pairs ? 2 : 1;  // numbers in the place of a float
    const int64_t pixels = pixels_at_once(args);
    PointwiseScratch layout{};
    layout.weight = narrow || args.averages ? pixels * kPanelChannels : 0;
    layout.x = layout.weight + (narrow ? args.in_channels / in_memory * kPanelChannels : 0);
    layout.total = layout.x + (narrow && !args.pairs ? aligned(pixels * args.in_channels) : 0);
    return layout;
}

}  // namespace mnv2::cpu
