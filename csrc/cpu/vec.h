// Vec: a register of floats, the few operations that the kernel needs, once per instruction set.
// Included inside a target region (see isa/avx512.cpp); everything has internal linkage.
//
// load(p, n), store(p, n, v): the first n lanes only, memory after them is not touched.
// at_least keeps NaN. fraction(u) is u - floor(u), times_power(p, u) p * 2^floor(u) for u in
// [-126, 127] and p near [1, 2), reciprocal(d) about 1 / d for finite d >= 1; all keep NaN.
// clip keeps NaN: x86 min and max return their second operand where one is NaN, NEON's return NaN.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header starts from a register it leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace mnv2::cpu {
namespace {

#if MNV2_LANES == 16

struct Vec {
    __m512 v;
};
constexpr int64_t kLanes = 16;
constexpr int kRegisters = 32;

inline __mmask16 lanes_below(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, int64_t n, Vec a) { _mm512_mask_storeu_ps(p, lanes_below(n), a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec clip(Vec x, Vec lower, Vec upper) {
    return {_mm512_min_ps(upper.v, _mm512_max_ps(lower.v, x.v))};
}
inline Vec at_least(Vec x, Vec lower) { return {_mm512_max_ps(lower.v, x.v)}; }
constexpr bool kPowersOfAll = true;  // times_power takes any u
inline Vec fraction(Vec u) {
    return {_mm512_reduce_ps(u.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
inline Vec times_power(Vec p, Vec u) { return {_mm512_scalef_ps(p.v, u.v)}; }
// One step of Newton for 1 / d, whose product with an infinite numerator is what it should be.
inline Vec reciprocal(Vec d) {
    const __m512 r = _mm512_rcp14_ps(d.v);
    return {_mm512_mul_ps(r, _mm512_fnmadd_ps(d.v, r, _mm512_set1_ps(2)))};
}

// Two rows of a matrix interleaved: lanes of a vector are column 0 of both, column 1 of both, ...
constexpr bool kInterleaves = true;
inline Vec broadcast_both(const float* p) {
    double both;
    std::memcpy(&both, p, sizeof both);
    return {_mm512_castpd_ps(_mm512_set1_pd(both))};
}
// Lane 2i + lane 2i + 1, of a and then of b.
inline Vec add_neighbours(Vec a, Vec b) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v),
                          _mm512_permutex2var_ps(a.v, odd, b.v))};
}
// The first 8 lanes of both or all 16; what follows in memory.
inline float* store_interleaved(float* p, int64_t lanes, Vec first, Vec second) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(first.v, low, second.v));
    if (lanes > 8) _mm512_storeu_ps(p + kLanes, _mm512_permutex2var_ps(first.v, high, second.v));
    return p + 2 * lanes;
}

// Stops the compiler from loading once per use: one load port feeds two multiply-adds then.
inline void keep_in_register(Vec& a) { asm("" : "+v"(a.v)); }

#elif MNV2_LANES == 8

struct Vec {
    __m256 v;
};
constexpr int64_t kLanes = 8;
constexpr int kRegisters = 16;

inline __m256i lanes_below(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lanes_below(n))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, int64_t n, Vec a) { _mm256_maskstore_ps(p, lanes_below(n), a.v); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec clip(Vec x, Vec lower, Vec upper) {
    return {_mm256_min_ps(upper.v, _mm256_max_ps(lower.v, x.v))};
}
inline Vec at_least(Vec x, Vec lower) { return {_mm256_max_ps(lower.v, x.v)}; }
constexpr bool kPowersOfAll = false;
inline Vec fraction(Vec u) { return {_mm256_sub_ps(u.v, _mm256_floor_ps(u.v))}; }
inline Vec times_power(Vec p, Vec u) {
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(u.v)), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), power))};
}
inline Vec reciprocal(Vec d) { return {_mm256_div_ps(_mm256_set1_ps(1), d.v)}; }
inline void keep_in_register(Vec& a) { asm("" : "+x"(a.v)); }

#elif defined(__aarch64__)

struct Vec {
    float32x4_t v;
};
constexpr int64_t kLanes = 4;
constexpr int kRegisters = 32;

inline Vec zero() { return {vdupq_n_f32(0)}; }
inline Vec broadcast(float s) { return {vdupq_n_f32(s)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const float* p, int64_t n) {
    Vec a = zero();
    if (n > 0) a.v = vld1q_lane_f32(p, a.v, 0);
    if (n > 1) a.v = vld1q_lane_f32(p + 1, a.v, 1);
    if (n > 2) a.v = vld1q_lane_f32(p + 2, a.v, 2);
    if (n > 3) a.v = vld1q_lane_f32(p + 3, a.v, 3);
    return a;
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(float* p, int64_t n, Vec a) {
    if (n > 0) vst1q_lane_f32(p, a.v, 0);
    if (n > 1) vst1q_lane_f32(p + 1, a.v, 1);
    if (n > 2) vst1q_lane_f32(p + 2, a.v, 2);
    if (n > 3) vst1q_lane_f32(p + 3, a.v, 3);
}
inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec clip(Vec x, Vec lower, Vec upper) {
    return {vminq_f32(upper.v, vmaxq_f32(lower.v, x.v))};
}
inline Vec at_least(Vec x, Vec lower) { return {vmaxq_f32(lower.v, x.v)}; }
constexpr bool kPowersOfAll = false;
inline Vec fraction(Vec u) { return {vsubq_f32(u.v, vrndmq_f32(u.v))}; }
inline Vec times_power(Vec p, Vec u) {
    const int32x4_t power = vshlq_n_s32(vcvtmq_s32_f32(u.v), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.v), power))};
}
inline Vec reciprocal(Vec d) { return {vdivq_f32(vdupq_n_f32(1), d.v)}; }
inline void keep_in_register(Vec& a) { asm("" : "+w"(a.v)); }

#else  // GNU vectors: SSE2 on x86-64, whatever 16 bytes there are elsewhere

struct Vec {
    typedef float Floats __attribute__((vector_size(16)));
    Floats v;
};
constexpr int64_t kLanes = 4;
constexpr int kRegisters = 16;

inline Vec zero() { return {Vec::Floats{}}; }
inline Vec broadcast(float s) { return {Vec::Floats{s, s, s, s}}; }
inline Vec load(const float* p) {
    Vec a;
    std::memcpy(&a.v, p, sizeof a.v);
    return a;
}
inline Vec load(const float* p, int64_t n) {
    Vec a = zero();
    for (int64_t i = 0; i < n; i++) a.v[i] = p[i];
    return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
inline void store(float* p, int64_t n, Vec a) {
    for (int64_t i = 0; i < n; i++) p[i] = a.v[i];
}
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec clip(Vec x, Vec lower, Vec upper) {
    const Vec::Floats above = x.v < lower.v ? lower.v : x.v;
    return {above > upper.v ? upper.v : above};
}
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec at_least(Vec x, Vec lower) { return {x.v < lower.v ? lower.v : x.v}; }
constexpr bool kPowersOfAll = false;
// Of every lane: SSE2 has no rounding downwards. NaN stays NaN in `fraction` and counts as 0 here.
inline Vec floor_of(Vec u) {
    Vec floor;
    for (int64_t i = 0; i < kLanes; i++) {
        const float lane = u.v[i] == u.v[i] ? u.v[i] : 0;
        const auto towards_zero = static_cast<float>(static_cast<int32_t>(lane));
        floor.v[i] = towards_zero > lane ? towards_zero - 1 : towards_zero;
    }
    return floor;
}
inline Vec fraction(Vec u) { return {u.v - floor_of(u).v}; }
inline Vec times_power(Vec p, Vec u) {
    typedef int32_t Integers __attribute__((vector_size(16)));
    const Integers power = __builtin_convertvector(floor_of(u).v, Integers) << 23;
    Integers bits;
    std::memcpy(&bits, &p.v, sizeof bits);
    bits += power;
    std::memcpy(&p.v, &bits, sizeof bits);
    return p;
}
inline Vec reciprocal(Vec d) { return {1 / d.v}; }
inline void keep_in_register(Vec&) {}

#endif

#if MNV2_LANES != 16
// Narrower vectors divide the channel counts of real networks.
constexpr bool kInterleaves = false;
inline Vec broadcast_both(const float*) { return zero(); }
inline Vec add_neighbours(Vec, Vec) { return zero(); }
inline float* store_interleaved(float* p, int64_t, Vec, Vec) { return p; }
#endif

// The first `lanes` floats at `from`; a whole vector needs no mask.
inline Vec load_lanes(const float* from, int64_t lanes) {
    return lanes == kLanes ? load(from) : load(from, lanes);
}

inline void store_lanes(float* to, int64_t lanes, Vec a) {
    if (lanes == kLanes)
        store(to, a);
    else
        store(to, lanes, a);
}

}  // namespace
}  // namespace mnv2::cpu
