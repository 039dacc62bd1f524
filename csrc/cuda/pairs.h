// Numbers of the host as pairs of 16-bit floats, for kernels' arguments.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mnv2::cuda {

// A number rounded to T (__half or __nv_bfloat16), in both halves of a Pair.
template <class T>
uint32_t twice(float value) {
    uint16_t bits;
    if constexpr (std::is_same_v<T, __half>)
        bits = __half_raw(__float2half_rn(value)).x;
    else
        bits = __nv_bfloat16_raw(__float2bfloat16_rn(value)).x;
    return bits * 0x10001u;
}

}  // namespace mnv2::cuda
