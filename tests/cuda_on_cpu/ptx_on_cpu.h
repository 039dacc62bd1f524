// csrc/cuda/ptx.h for the emulator: the same functions, for one lane.
#pragma once
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator.h"
#include "rounding.h"

#define MNV2_DEVICE inline

namespace mnv2::cuda {

// ---- Threads

MNV2_DEVICE int thread_index() { return emulator::thread_index(); }
MNV2_DEVICE int block_threads() { return emulator::block_threads(); }
MNV2_DEVICE int block_index() { return emulator::block_index(); }
MNV2_DEVICE int grid_blocks() { return emulator::grid_blocks(); }
MNV2_DEVICE void block_barrier() { emulator::block_barrier(); }
MNV2_DEVICE void warp_barrier() { emulator::warp_barrier(); }

// ---- Shared memory

MNV2_DEVICE SharedAddress shared_memory() { return emulator::shared_memory(); }
template <class Value>
MNV2_DEVICE Value load_shared(SharedAddress address) {
    Value value;
    emulator::load(address, &value, sizeof(value));
    return value;
}
template <class Value>
MNV2_DEVICE void store_shared(SharedAddress address, Value value) {
    emulator::store(address, &value, sizeof(value));
}

MNV2_DEVICE void copy_async(SharedAddress to, const void* source, int bytes = 16) {
    emulator::copy_async(to, source, bytes);
}
MNV2_DEVICE void copy_async_commit() { emulator::copy_async_commit(); }
template <int Pending>
MNV2_DEVICE void copy_async_wait() {
    emulator::copy_async_wait(Pending);
}

// ---- Clusters

MNV2_DEVICE int cluster_rank() { return emulator::cluster_rank(); }
MNV2_DEVICE void cluster_barrier() { emulator::cluster_barrier(); }
// More is seen behind it here than on a GPU.
MNV2_DEVICE void cluster_barrier_relaxed() { emulator::cluster_barrier(); }
MNV2_DEVICE uint4 load_cluster(SharedAddress address, int rank) {
    uint4 value;
    emulator::load_cluster(address, rank, &value, sizeof(value));
    return value;
}

// ---- Matrices in registers

MNV2_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
    emulator::load_matrices(r, 4, false, row);
}
MNV2_DEVICE void load_matrices(uint32_t (&r)[2], SharedAddress row) {
    emulator::load_matrices(r, 2, false, row);
}
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
    emulator::load_matrices(r, 4, true, row);
}
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[2], SharedAddress row) {
    emulator::load_matrices(r, 2, true, row);
}
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[1], SharedAddress row) {
    emulator::load_matrices(r, 1, true, row);
}

template <class T>
MNV2_DEVICE void multiply_add_k16(float (&sums)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    emulator::Product lane{16,   "mma.m16n8k16",           emulator::Format<T>::to_float,
                           sums, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::multiply_add(lane);
}
template <class T>
MNV2_DEVICE void multiply_add_k16(float (&sums)[4], const float (&start)[4], const Pair (&a)[4],
                                  Pair b0, Pair b1) {
    for (int i = 0; i < 4; i++) sums[i] = start[i];
    multiply_add_k16<T>(sums, a, b0, b1);
}
template <class T>
MNV2_DEVICE void multiply_add_k8(float (&sums)[4], Pair a0, Pair a1, Pair b0) {
    emulator::Product lane{8, "mma.m16n8k8", emulator::Format<T>::to_float, sums, {a0, a1}, {b0}};
    emulator::multiply_add(lane);
}

// ---- Arithmetic

// nvcc has these without a namespace.
using std::max;
using std::min;

MNV2_DEVICE int opaque(int v) { return v; }

MNV2_DEVICE float minimum(float a, float b) { return emulator::minimum(a, b); }
MNV2_DEVICE float maximum(float a, float b) { return emulator::maximum(a, b); }

template <class T>
MNV2_DEVICE Pair pack(float low, float high) {
    using Format = emulator::Format<T>;
    return Format::round(low) | static_cast<Pair>(Format::round(high)) << 16;
}
template <class T>
MNV2_DEVICE float2 unpack(Pair v) {
    using Format = emulator::Format<T>;
    return make_float2(Format::to_float(static_cast<uint16_t>(v)),
                       Format::to_float(static_cast<uint16_t>(v >> 16)));
}
template <class T>
MNV2_DEVICE Pair pack_relu(float low, float high) {
    return pack<T>(emulator::maximum(low, 0.f), emulator::maximum(high, 0.f));
}
template <class T>
MNV2_DEVICE Pair multiply_add(Pair a, Pair b, Pair c) {
    const float2 x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
    using Format = emulator::Format<T>;
    return Format::round(emulator::exact_enough(x.x, y.x, z.x)) |
           static_cast<Pair>(Format::round(emulator::exact_enough(x.y, y.y, z.y))) << 16;
}
template <class T>
MNV2_DEVICE Pair minimum(Pair a, Pair b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(emulator::minimum(x.x, y.x), emulator::minimum(x.y, y.y));
}
template <class T>
MNV2_DEVICE Pair maximum(Pair a, Pair b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(emulator::maximum(x.x, y.x), emulator::maximum(x.y, y.y));
}
template <class T>
MNV2_DEVICE Pair multiply_add_relu(Pair a, Pair b, Pair c) {
    return maximum<T>(multiply_add<T>(a, b, c), 0u);
}

}  // namespace mnv2::cuda
