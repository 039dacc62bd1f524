// The backward kernel for AVX2 with FMA; runs only where kernels.cpp allows it.
#if defined(__x86_64__)
#include "../backward.h"
#include "includes.h"
MNV2_BEGIN_TARGET("avx2,fma,f16c")
#define MNV2_LANES 8
#include "../training.inc"
MNV2_DEFINE_BACKWARD(kAvx2Backward, "avx2")
MNV2_END_TARGET
#endif
