// The instructions that the kernels are written in: every inline assembly of the project, and every
// access to shared memory. tests/cuda_on_cpu has the same functions for a host compiler, lane by
// lane, which is how the kernels run where there is no GPU.
//
// Pair: two 16-bit floats in a register, the lower channel in the lower half. T is __half or
// __nv_bfloat16. Registers of fragments are those of the PTX manual ("Warp Level Matrix Multiply"):
// in what follows g = lane / 4 and t = lane % 4.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mnv2::cuda {

using Pair = uint32_t;
// Byte offset in the window of shared memory.
using SharedAddress = uint32_t;

}  // namespace mnv2::cuda

#ifndef __CUDACC__
#include "ptx_on_cpu.h"
#else

namespace mnv2::cuda {

#define MNV2_DEVICE __device__ __forceinline__

// ---- Threads

MNV2_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MNV2_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
MNV2_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
MNV2_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }
// Waits for all threads of the block. What they wrote to shared memory is seen afterwards.
MNV2_DEVICE void block_barrier() { __syncthreads(); }
// The same for the 32 lanes of a warp.
MNV2_DEVICE void warp_barrier() { __syncwarp(); }

// A value of which the compiler knows nothing: it makes no sums of it ahead of a loop, where they
// would take registers, and does not compute it anew inside of one.
MNV2_DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ---- Shared memory

// Where the block's dynamic shared memory starts, a multiple of 128 bytes.
MNV2_DEVICE SharedAddress shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return static_cast<SharedAddress>(__cvta_generic_to_shared(bytes));
}
// Value is 2, 4, 8 or 16 bytes, address a multiple of that.
template <class Value>
MNV2_DEVICE Value load_shared(SharedAddress address);
template <class Value>
MNV2_DEVICE void store_shared(SharedAddress address, Value value);

template <>
MNV2_DEVICE uint16_t load_shared<uint16_t>(SharedAddress address) {
    uint16_t v;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}
template <>
MNV2_DEVICE uint32_t load_shared<uint32_t>(SharedAddress address) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
template <>
MNV2_DEVICE float load_shared<float>(SharedAddress address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}
template <>
MNV2_DEVICE uint2 load_shared<uint2>(SharedAddress address) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}
template <>
MNV2_DEVICE float2 load_shared<float2>(SharedAddress address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
    return v;
}
template <>
MNV2_DEVICE uint4 load_shared<uint4>(SharedAddress address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}
template <>
MNV2_DEVICE float4 load_shared<float4>(SharedAddress address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address));
    return v;
}
template <>
MNV2_DEVICE void store_shared<uint16_t>(SharedAddress address, uint16_t v) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v));
}
template <>
MNV2_DEVICE void store_shared<uint32_t>(SharedAddress address, uint32_t v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v));
}
template <>
MNV2_DEVICE void store_shared<float>(SharedAddress address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v));
}
template <>
MNV2_DEVICE void store_shared<uint2>(SharedAddress address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y));
}
template <>
MNV2_DEVICE void store_shared<float2>(SharedAddress address, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y));
}
template <>
MNV2_DEVICE void store_shared<uint4>(SharedAddress address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w));
}
template <>
MNV2_DEVICE void store_shared<float4>(SharedAddress address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w));
}

// Begins to copy 16 bytes to shared memory, of which the first `bytes` (0 to 16) are read from
// `source` and the others are zero. Both addresses are multiples of 16.
MNV2_DEVICE void copy_async(SharedAddress to, const void* source, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes));
}
// Ends a group of this thread's copies.
MNV2_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;"); }
// Waits until at most `Pending` of this thread's newest groups are under way; other threads see the
// copies after a barrier.
template <int Pending>
MNV2_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending));
}

// ---- Clusters: blocks that see one another's shared memory. Compute capability 9.0 and later;
// elsewhere no kernel that uses them is launched, and a trap ends one that was.

MNV2_DEVICE int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
    __trap();
#endif
    return static_cast<int>(rank);
}
// All threads of all blocks of the cluster come here.
MNV2_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __trap();
#endif
}
// The same, but that what was written before need not be seen afterwards: a wait for the others'
// reads, without one for all of this block's writes.
MNV2_DEVICE void cluster_barrier_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::
                     : "memory");
#else
    __trap();
#endif
}
// 16 bytes at `address` in the shared memory of block `rank` of the cluster.
MNV2_DEVICE uint4 load_cluster(SharedAddress address, int rank) {
    uint4 v = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(there));
#else
    __trap();
#endif
    return v;
}

// ---- Matrices in registers

// Loads 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m, 16
// bytes at a multiple of 16; r[m] then holds elements 2t, 2t + 1 of row g of matrix m, or with
// _transposed elements g of rows 2t, 2t + 1.
MNV2_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
MNV2_DEVICE void load_matrices(uint32_t (&r)[2], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row));
}
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[2], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row));
}
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[1], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(row));
}

// sums (16 x 8) += a (16 x K) b (K x 8), summed in float. Lane (g, t) holds
//   sums: [0], [1] row g, columns 2t, 2t + 1; [2], [3] row g + 8
//   a:    [0] row g, k 2t, 2t + 1; [1] row g + 8; [2], [3] the same rows, k 2t + 8, 2t + 9 (K = 16)
//   b:    [0] k 2t, 2t + 1 of column g; [1] k 2t + 8, 2t + 9 (K = 16)
// The first form leaves `start` + a b in sums.
template <class T>
MNV2_DEVICE void multiply_add_k16(float (&sums)[4], const float (&start)[4], const Pair (&a)[4],
                                  Pair b0, Pair b1);
template <class T>
MNV2_DEVICE void multiply_add_k16(float (&sums)[4], const Pair (&a)[4], Pair b0, Pair b1);
template <class T>
MNV2_DEVICE void multiply_add_k8(float (&sums)[4], Pair a0, Pair a1, Pair b0);

#define MNV2_MULTIPLY_ADD(T, NAME)                                                                \
    template <>                                                                                   \
    MNV2_DEVICE void multiply_add_k16<T>(float (&sums)[4], const float (&start)[4],               \
                                         const Pair(&a)[4], Pair b0, Pair b1) {                   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                       \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"   \
                     : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1),              \
                       "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));               \
    }                                                                                             \
    template <>                                                                                   \
    MNV2_DEVICE void multiply_add_k16<T>(float (&sums)[4], const Pair(&a)[4], Pair b0, Pair b1) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                       \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));             \
    }                                                                                             \
    template <>                                                                                   \
    MNV2_DEVICE void multiply_add_k8<T>(float (&sums)[4], Pair a0, Pair a1, Pair b0) {            \
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                        \
                     ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                   \
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                 \
                     : "r"(a0), "r"(a1), "r"(b0));                                                \
    }
MNV2_MULTIPLY_ADD(__half, "f16")
MNV2_MULTIPLY_ADD(__nv_bfloat16, "bf16")
#undef MNV2_MULTIPLY_ADD

// ---- Arithmetic. Minimum and maximum keep NaN, as PyTorch's clamp does.

MNV2_DEVICE float minimum(float a, float b) {
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
MNV2_DEVICE float maximum(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// Two floats rounded to a pair; pack_relu with max(0, .) on the way.
template <class T>
MNV2_DEVICE Pair pack(float low, float high);
template <class T>
MNV2_DEVICE Pair pack_relu(float low, float high);
// (a * b + c), rounded once, both halves; multiply_add_relu with max(0, .) on the way.
template <class T>
MNV2_DEVICE Pair multiply_add(Pair a, Pair b, Pair c);
template <class T>
MNV2_DEVICE Pair multiply_add_relu(Pair a, Pair b, Pair c);
template <class T>
MNV2_DEVICE Pair minimum(Pair a, Pair b);
template <class T>
MNV2_DEVICE Pair maximum(Pair a, Pair b);
template <class T>
MNV2_DEVICE float2 unpack(Pair v);

#define MNV2_PAIRS(T, NAME)                                                               \
    template <>                                                                           \
    MNV2_DEVICE Pair pack<T>(float low, float high) {                                     \
        Pair v;                                                                           \
        asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));         \
        return v;                                                                         \
    }                                                                                     \
    template <>                                                                           \
    MNV2_DEVICE Pair pack_relu<T>(float low, float high) {                                \
        Pair v;                                                                           \
        asm("cvt.rn.relu." NAME "x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));    \
        return v;                                                                         \
    }                                                                                     \
    template <>                                                                           \
    MNV2_DEVICE Pair multiply_add<T>(Pair a, Pair b, Pair c) {                            \
        Pair v;                                                                           \
        asm("fma.rn." NAME "x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));      \
        return v;                                                                         \
    }                                                                                     \
    template <>                                                                           \
    MNV2_DEVICE Pair multiply_add_relu<T>(Pair a, Pair b, Pair c) {                       \
        Pair v;                                                                           \
        asm("fma.rn.relu." NAME "x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c)); \
        return v;                                                                         \
    }                                                                                     \
    template <>                                                                           \
    MNV2_DEVICE Pair minimum<T>(Pair a, Pair b) {                                         \
        Pair v;                                                                           \
        asm("min.NaN." NAME "x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));                 \
        return v;                                                                         \
    }                                                                                     \
    template <>                                                                           \
    MNV2_DEVICE Pair maximum<T>(Pair a, Pair b) {                                         \
        Pair v;                                                                           \
        asm("max.NaN." NAME "x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));                 \
        return v;                                                                         \
    }
MNV2_PAIRS(__half, "f16")
MNV2_PAIRS(__nv_bfloat16, "bf16")
#undef MNV2_PAIRS

template <>
MNV2_DEVICE float2 unpack<__half>(Pair v) {
    float2 f;
    asm("{.reg .f16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
        "cvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;}"
        : "=f"(f.x), "=f"(f.y)
        : "r"(v));
    return f;
}
template <>
MNV2_DEVICE float2 unpack<__nv_bfloat16>(Pair v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

}  // namespace mnv2::cuda
#endif
