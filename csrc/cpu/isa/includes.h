// All headers of the kernel sources. They stand above the target region of each instruction set, so
// that their inline functions are compiled for the baseline wherever the linker takes them from.
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

#include "../kernels.h"
