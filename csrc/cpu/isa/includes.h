// All headers of the kernel sources, included above the target region of each instruction set.
// Their inline functions are then compiled for the baseline, whichever copy the linker keeps.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__x86_64__) && defined(__clang__)
#error "csrc/cpu/isa needs GCC, whose target pragma clang does not know: set CXX=g++"
#endif

#include "../kernels.h"
#include "../sizes.h"
