// The kernel for the baseline of the machine: SSE2 on x86-64; aarch64 has one of its own.
#if !defined(__aarch64__)
#include "includes.h"
#define MNV2_LANES 4
#include "kernel.inc"
MNV2_DEFINE_KERNEL(kGenericKernel, "default", "DEFAULT")
#endif
