// The backward kernel for AVX-512; runs only where kernels.cpp allows it.
#if defined(__x86_64__)
#include "../backward.h"
#include "includes.h"
MNV2_BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,fma,f16c,avx512bf16")
#define MNV2_LANES 16
#include "../training.inc"
MNV2_DEFINE_BACKWARD(kAvx512Backward, "avx512")
MNV2_END_TARGET
#endif
