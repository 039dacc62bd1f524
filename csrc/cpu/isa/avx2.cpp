// The kernel for AVX2 with FMA. Compiled on every x86-64 build; runs only where kernels.cpp allows.
#if defined(__x86_64__)
#include "includes.h"
MNV2_BEGIN_TARGET("avx2,fma,f16c")
#define MNV2_LANES 8
#include "kernel.inc"
MNV2_DEFINE_KERNEL(kAvx2Kernel, "avx2", "AVX2")
MNV2_END_TARGET
#endif
