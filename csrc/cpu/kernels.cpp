#include "kernels.h"

#include <cstring>

namespace mnv2::cpu {

const Kernel* const kKernels[] = {
#if defined(__x86_64__)
    &kAvx512Kernel,  // Intel Skylake-X and later servers, AMD Zen 4 and later
    &kAvx2Kernel,    // Intel Haswell and later, AMD Zen
#endif
    &kGenericKernel,  // every x86-64 (SSE2), every aarch64 (NEON)
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

}  // namespace mnv2::cpu
