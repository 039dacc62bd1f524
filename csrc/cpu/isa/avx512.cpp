// The kernel for AVX-512. Compiled on every x86-64 build; runs only where kernels.cpp allows it.
#if defined(__x86_64__)
#include "includes.h"
MNV2_BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,fma,f16c,avx512bf16")
#define MNV2_LANES 16
#include "kernel.inc"
MNV2_DEFINE_KERNEL(kAvx512Kernel, "avx512", "AVX512")
MNV2_END_TARGET
#endif
