// What instructions compute. `in` is 512 bytes for matrices: 16 bytes a row.
#pragma once

#include "probe.h"

namespace mnv2::cuda {

namespace {

MNV2_DEVICE void stage_matrices(const Probe& p) {
    copy_async(word(lane() * 4), p.in + lane() * 4);
    copy_async_commit();
    copy_async_wait<0>();
    warp_barrier();
}

template <int Count, bool Transposed>
__global__ void matrices(Probe p) {
    stage_matrices(p);
    uint32_t r[Count];
    // The lanes of matrices that are not loaded give no address.
    const SharedAddress row = lane() < 8 * Count ? word(lane() * 4) : 1;
    if constexpr (Transposed)
        load_matrices_transposed(r, row);
    else
        load_matrices(r, row);
    for (int m = 0; m < Count; m++) p.out[m * 32 + lane()] = r[m];
}

// The first 8 rows lie `number` bytes apart: the same row is one address.
__global__ void passes(Probe p) {
    for (int i = 0; i < 32; i++) store_shared(word((i * 32 + lane()) * 4), make_uint4(0, 0, 0, 0));
    warp_barrier();
    uint32_t r[2];
    load_matrices(r, shared_memory() + lane() % 8 * p.number);
    p.out[lane()] = r[0];
}

// `in`: a of every lane, then b, then sums.
template <class T, int K>
__global__ void product(Probe p) {
    const uint32_t* in = p.in + lane();
    float sums[4];
    Pair a[4] = {}, b[2] = {};
    for (int i = 0; i < K / 4; i++) a[i] = in[i * 32];
    for (int i = 0; i < K / 8; i++) b[i] = in[(K / 4 + i) * 32];
    memcpy(sums, p.in + (K / 4 + K / 8) * 32 + lane() * 4, 16);
    if constexpr (K == 16)
        multiply_add_k16<T>(sums, a, b[0], b[1]);
    else
        multiply_add_k8<T>(sums, a[0], a[1], b[0]);
    memcpy(p.out + lane() * 4, sums, 16);
}

// `in`: `number` times three pairs. `out`: what each of the functions makes of them.
template <class T>
__global__ void arithmetic(Probe p) {
    for (int i = thread_index(); i < p.number; i += block_threads()) {
        const Pair a = p.in[3 * i], b = p.in[3 * i + 1], c = p.in[3 * i + 2];
        Pair* out = p.out + 4 * i;
        out[0] = multiply_add<T>(a, b, c);
        out[1] = multiply_add_relu<T>(a, b, c);
        out[2] = minimum<T>(a, b);
        out[3] = maximum<T>(a, b);
    }
}

// `in`: `number` times two floats. `out`: packed, packed behind a ReLU, minimum, maximum.
template <class T>
__global__ void rounding(Probe p) {
    for (int i = thread_index(); i < p.number; i += block_threads()) {
        float v[2];
        memcpy(v, p.in + 2 * i, 8);
        uint32_t* out = p.out + 6 * i;
        out[0] = pack<T>(v[0], v[1]);
        out[1] = pack_relu<T>(v[0], v[1]);
        const float2 back = unpack<T>(out[0]);
        const float floats[4] = {minimum(v[0], v[1]), maximum(v[0], v[1]), back.x, back.y};
        memcpy(out + 2, floats, 16);
    }
}

// Copies the first `number` bytes of `in`; the others become 0.
__global__ void copy_with_zeros(Probe p) {
    copy_async(word(lane() * 4), p.number > 0 ? p.in : nullptr, p.number);
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < 4; i++) p.out[i] = get(lane() * 4 + i);
}

}  // namespace

}  // namespace mnv2::cuda
