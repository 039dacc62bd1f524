// Numbers of 16 bits as they are stored, and how a Vec is loaded from and stored to them. As in
// vec.h, load(p, n) and store(p, n, v) touch the first n numbers only. Rounding is to nearest even;
// NaN stays NaN, numbers too large for a half become infinite.
//
// Each instruction set has Bits, the 16-bit numbers of a Vec, with load_bits, store_bits, widen and
// narrow; the rest follows from these.
#pragma once
#include "vec.h"

namespace mnv2::cpu {
namespace {

struct Bfloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

#if MNV2_LANES == 16

using Bits = __m256i;

inline Bits load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const Bits*>(p)); }
inline void store_bits(void* p, Bits bits) { _mm256_storeu_si256(static_cast<Bits*>(p), bits); }
inline Bits load_bits(const void* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(lanes_below(n), p);
}
inline void store_bits(void* p, int64_t n, Bits bits) {
    _mm256_mask_storeu_epi16(p, lanes_below(n), bits);
}
inline Vec widen(Bits bits, Bfloat16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(Bits bits, Half) { return {_mm512_cvtph_ps(bits)}; }
inline Bits narrow(Vec a, Bfloat16) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}
inline Bits narrow(Vec a, Half) {
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Pairs of bfloat16 numbers in the lanes of a Vec, as AVX512-BF16 multiplies them. These functions
// run only where has_pairs() is true. Denormal numbers count as zeros.
constexpr bool kHasPairs = true;
inline bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }
// c + low(a) * low(b) + high(a) * high(b) in every lane.
inline Vec multiply_pairs(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline void store_rounded(Bfloat16* p, Vec a) {
    const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
    std::memcpy(p, &rounded, sizeof rounded);
}
// Numbers [0, n) of two rows: number i of the first in the low half of lane i.
inline Vec load_pairs(const Bfloat16* low, const Bfloat16* high, int64_t n) {
    const __m512i a = _mm512_cvtepu16_epi32(load_bits(low, n));
    const __m512i b = _mm512_cvtepu16_epi32(load_bits(high, n));
    return {_mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)))};
}

#elif MNV2_LANES == 8

using Bits = __m128i;

inline Bits load_bits(const void* p) { return _mm_loadu_si128(static_cast<const Bits*>(p)); }
inline void store_bits(void* p, Bits bits) { _mm_storeu_si128(static_cast<Bits*>(p), bits); }
inline Vec widen(Bits bits, Bfloat16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(Bits bits, Half) { return {_mm256_cvtph_ps(bits)}; }
inline Bits narrow(Vec a, Bfloat16) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}
inline Bits narrow(Vec a, Half) {
    return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__aarch64__)

using Bits = uint16x4_t;

inline Bits load_bits(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }
inline void store_bits(void* p, Bits bits) { vst1_u16(static_cast<uint16_t*>(p), bits); }
inline Vec widen(Bits bits, Bfloat16) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16))};
}
inline Vec widen(Bits bits, Half) { return {vcvt_f32_f16(vreinterpret_f16_u16(bits))}; }
inline Bits narrow(Vec a, Bfloat16) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet), 16);
}
inline Bits narrow(Vec a, Half) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }

#else

struct Bits {
    uint16_t at[kLanes];
};

inline Bits load_bits(const void* p) {
    Bits bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}
inline void store_bits(void* p, Bits bits) { std::memcpy(p, &bits, sizeof bits); }
inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float widen(Bfloat16 a) { return from_bits(static_cast<uint32_t>(a.bits) << 16); }
inline Bfloat16 narrow(float a, Bfloat16) {
    const uint32_t bits = to_bits(a);
    const uint32_t result = a != a ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    return {static_cast<uint16_t>(result >> 16)};
}
// A half has 5 bits of exponent, biased by 15, and 10 of mantissa. A float's exponent is biased by
// 127, so that the bits of a half, moved up by 13, are the float of the number times 2^-112.
inline float widen(Half a) {
    const uint32_t magnitude = static_cast<uint32_t>(a.bits & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16;
    constexpr uint32_t kInfinite = 0x7c00u << 13;
    if (magnitude >= kInfinite) return from_bits(sign | 0x7f800000 | (magnitude - kInfinite));
    return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}
inline Half narrow(float a, Half) {
    const uint32_t bits = to_bits(a), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const auto make = [&](uint32_t rest) { return Half{static_cast<uint16_t>(sign | rest)}; };
    if (magnitude > 0x7f800000) return make(0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return make(0x7c00);  // 65520, which rounds up to 2^16
    // Below 2^-14 the sum with 1/2 rounds to a multiple of 2^-24, the smallest half.
    if (magnitude < 0x38800000) return make(to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
    return make((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
template <class T>
inline Vec widen(Bits bits, T) {
    Vec a;
    for (int64_t i = 0; i < kLanes; i++) a.v[i] = widen(T{bits.at[i]});
    return a;
}
template <class T>
inline Bits narrow(Vec a, T) {
    Bits bits;
    for (int64_t i = 0; i < kLanes; i++) bits.at[i] = narrow(a.v[i], T{}).bits;
    return bits;
}

#endif

#if MNV2_LANES != 16
inline Bits load_bits(const void* p, int64_t n) {
    uint16_t whole[kLanes] = {};
    std::memcpy(whole, p, n * sizeof *whole);
    return load_bits(whole);
}
inline void store_bits(void* p, int64_t n, Bits bits) {
    uint16_t whole[kLanes];
    store_bits(whole, bits);
    std::memcpy(p, whole, n * sizeof *whole);
}

constexpr bool kHasPairs = false;
inline bool has_pairs() { return false; }
inline Vec multiply_pairs(Vec, Vec, Vec c) { return c; }
inline void store_rounded(Bfloat16*, Vec) {}
inline Vec load_pairs(const Bfloat16*, const Bfloat16*, int64_t) { return zero(); }
#endif

template <class T>
inline Vec load(const T* p) {
    return widen(load_bits(p), T{});
}
template <class T>
inline Vec load(const T* p, int64_t n) {
    return widen(load_bits(p, n), T{});
}
template <class T>
inline void store(T* p, Vec a) {
    store_bits(p, narrow(a, T{}));
}
template <class T>
inline void store(T* p, int64_t n, Vec a) {
    store_bits(p, n, narrow(a, T{}));
}

template <class T>
inline float to_float(T a) {
    float value;
    store(&value, 1, load(&a, 1));
    return value;
}

// dst[0, padded) = src[0, width), zeros after them; src nullptr: all zeros. padded: whole vectors.
template <class T>
void copy_padded(float* dst, const T* src, int64_t width, int64_t padded) {
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t n = std::min(width - i, kLanes);
        store(dst + i, src == nullptr || n <= 0 ? zero()
                       : n == kLanes            ? load(src + i)
                                                : load(src + i, n));
    }
}

// dst[0, count) = src[0, count).
template <class From, class To>
void convert(To* dst, const From* src, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(dst + i, load(src + i));
    if (i < count) store(dst + i, count - i, load(src + i, count - i));
}

}  // namespace
}  // namespace mnv2::cpu
