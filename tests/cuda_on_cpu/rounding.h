// Arithmetic of a GPU in float, half and bfloat16. Every NaN that comes out is the same one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emulator {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// -0 is less than +0.
inline float minimum(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<float>::quiet_NaN();
    return a < b || (a == b && std::signbit(a)) ? a : b;
}
inline float maximum(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<float>::quiet_NaN();
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// Where digits have to go, the last one that stays becomes odd: another rounding, to at least two
// digits less, then gives what one rounding would have given.
inline double to_odd(double rounded, double error) {
    if (error == 0 || !std::isfinite(rounded)) return rounded;
    const bool beyond = (error < 0) != (rounded < 0);
    uint64_t bits = bits_as<uint64_t>(rounded);
    if (beyond) bits--;
    return bits_as<double>(bits | 1);
}
inline float to_odd(double v) {
    const float rounded = static_cast<float>(v);
    if (static_cast<double>(rounded) == v || std::isnan(v) || std::isinf(v)) return rounded;
    uint32_t bits = bits_as<uint32_t>(rounded);
    if (std::abs(static_cast<double>(rounded)) > std::abs(v)) bits--;
    return bits_as<float>(bits | 1);
}

// a * b + c of 16-bit floats, to be rounded to one.
inline double exact_enough(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    const double part = sum - product;
    return to_odd(sum, (product - (sum - part)) + (c - part));
}

template <class T>
struct Format;

template <>
struct Format<__half> {
    static float to_float(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
    template <class Real>
    static uint16_t round(Real v) {
        return std::isnan(v) ? 0x7fff : bits_as<uint16_t>(static_cast<_Float16>(v));
    }
};

template <>
struct Format<__nv_bfloat16> {
    static float to_float(uint16_t bits) {
        return bits_as<float>(static_cast<uint32_t>(bits) << 16);
    }
    static uint16_t round(float v) {
        if (std::isnan(v)) return 0x7fff;
        const uint32_t bits = bits_as<uint32_t>(v);
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static uint16_t round(double v) { return round(to_odd(v)); }
};

}  // namespace emulator
