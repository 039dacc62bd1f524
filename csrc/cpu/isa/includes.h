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

// Functions from BEGIN to END are compiled for these instruction sets. clang ends a region that GCC
// lets end with the file.
#define MNV2_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MNV2_BEGIN_TARGET(names) \
    MNV2_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define MNV2_END_TARGET _Pragma("clang attribute pop")
#else
#define MNV2_BEGIN_TARGET(names) MNV2_PRAGMA(GCC target(names))
#define MNV2_END_TARGET
#endif

#include "../kernels.h"
#include "../sizes.h"
