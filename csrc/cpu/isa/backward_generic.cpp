// The backward kernel for the baseline of the machine: SSE2 on x86-64, NEON on aarch64.
#include "../backward.h"
#include "includes.h"
#define MNV2_LANES 4
#include "../training.inc"
MNV2_DEFINE_BACKWARD(kGenericBackward, "default")
