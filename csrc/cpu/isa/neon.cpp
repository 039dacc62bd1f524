// The kernel for NEON, which every aarch64 has.
#if defined(__aarch64__)
#include "includes.h"
#define MNV2_LANES 4
#include "kernel.inc"
MNV2_DEFINE_KERNEL(kNeonKernel, "neon", "DEFAULT")
#endif
