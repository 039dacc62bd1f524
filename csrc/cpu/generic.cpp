// The kernel for the baseline of the machine: SSE2 on x86-64, NEON on aarch64.
#include "isa_includes.h"
#define MNV2_LANES 4
#include "isa_kernel.inc"
MNV2_DEFINE_KERNEL(kGenericKernel, "default", "DEFAULT")
