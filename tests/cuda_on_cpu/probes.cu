// Small kernels for the emulator's own tests. Most are right unless `broken` is set, and then do
// one thing wrong that the emulator must see.
#include <cstring>

#include "probe.h"
#include "probes_of_values.cuh"

namespace mnv2::cuda {

namespace {

// ---- Barriers

__global__ void read_after_write(Probe p) {
    fill();
    if (warp() == p.number) put(lane());
    if (!p.broken) block_barrier();
    if (warp() != p.number) p.out[thread_index()] = get(lane());
}

__global__ void write_after_read(Probe p) {
    if (warp() == 0) put(lane());
    block_barrier();
    if (warp() != p.number) p.out[thread_index()] = get(lane());
    if (!p.broken) block_barrier();
    if (warp() == p.number) put(lane());
}

__global__ void write_after_write(Probe p) {
    if (warp() == p.number) put(lane());
    if (!p.broken) block_barrier();
    if (warp() != p.number) put(lane());
}

__global__ void read_other_lane(Probe p) {
    fill();
    put(thread_index());
    if (!p.broken) warp_barrier();
    p.out[thread_index()] = get(thread_index() ^ 1);
}

__global__ void write_what_other_lane_reads(Probe p) {
    put(thread_index());
    warp_barrier();
    p.out[thread_index()] = get(thread_index() ^ 1);
    if (!p.broken) warp_barrier();
    put(thread_index());
}

// A barrier of the warp is none between warps.
__global__ void warp_barrier_between_warps(Probe p) {
    fill();
    put(thread_index());
    p.broken ? warp_barrier() : block_barrier();
    p.out[thread_index()] = get(thread_index() ^ 32);
}

// Neither is a collective that moves registers one between lanes.
__global__ void ldmatrix_is_no_barrier(Probe p) {
    put(thread_index());
    warp_barrier();
    uint32_t r[4];
    load_matrices(r, word(warp() * 32 + lane() % 8 * 4));
    if (!p.broken) warp_barrier();
    put(thread_index());
}

__global__ void ldmatrix_after_write(Probe p) {
    put(thread_index());
    if (!p.broken) warp_barrier();
    uint32_t r[2];
    load_matrices(r, word(warp() * 32 + lane() % 8 * 4));
    p.out[thread_index()] = r[1];
}

__global__ void barrier_left_out_by_one(Probe p) {
    if (!(p.broken && thread_index() == p.number)) block_barrier();
    p.out[thread_index()] = 1;
}

__global__ void warp_barrier_left_out_by_one(Probe p) {
    if (!(p.broken && thread_index() == p.number)) warp_barrier();
    p.out[thread_index()] = 1;
}

__global__ void lanes_at_different_collectives(Probe p) {
    put(thread_index());
    block_barrier();
    uint32_t r[4];
    if (p.broken && lane() == p.number)
        warp_barrier();
    else
        load_matrices(r, word(lane() % 8 * 4));
    p.out[thread_index()] = 1;
}

__global__ void lanes_at_different_barriers(Probe p) {
    p.broken&& lane() == p.number ? block_barrier() : warp_barrier();
    block_barrier();
}

// ---- Addresses

__global__ void store_past_the_end(Probe p) {
    const int end = 512 + (p.broken ? 2 : 0);
    store_shared<uint16_t>(shared_memory() + end - 64 + lane() * 2, 1);
}

__global__ void load_before_the_start(Probe p) {
    put(thread_index());
    p.out[thread_index()] = get(thread_index() - (p.broken && thread_index() == 0));
}

__global__ void matrix_past_the_end(Probe p) {
    fill();
    uint32_t r[4];
    load_matrices(r, shared_memory() + lane() * 16 + (p.broken ? 16 : 0));
    p.out[thread_index()] = r[0];
}

__global__ void misaligned(Probe p) {
    const SharedAddress at = shared_memory() + thread_index() * 8 + (p.broken ? 2 : 0);
    store_shared<uint16_t>(at, 1);
    store_shared<uint16_t>(at + 2, 1);
    p.out[thread_index()] = load_shared<uint32_t>(at);
}

__global__ void misaligned_matrix(Probe p) {
    fill();
    uint32_t r[2];
    load_matrices(r, shared_memory() + lane() % 8 * 16 + (p.broken ? 8 : 0));
}

__global__ void copy_from_misaligned(Probe p) {
    copy_async(word(thread_index() * 4), p.in + (p.broken ? 1 : 0));
    copy_async_commit();
    copy_async_wait<0>();
}

__global__ void read_of_nothing(Probe p) {
    if (!p.broken || thread_index() != 5) put(thread_index());
    block_barrier();
    p.out[thread_index()] = get(thread_index() ^ 1);
}

__global__ void matrix_of_nothing(Probe p) {
    if (!p.broken || thread_index() != 5) put(thread_index());
    block_barrier();
    uint32_t r[4];
    load_matrices(r, shared_memory() + lane() % 16 * 16);
}

// The next block finds nothing of what this one wrote.
__global__ void read_what_the_last_block_wrote(Probe p) {
    if (!p.broken || block_index() == p.number) put(thread_index());
    p.out[thread_index()] = get(thread_index());
}

// Faults of the program itself. `number` is 0.
__global__ void write_to_nowhere(Probe p) {
    *(p.broken ? reinterpret_cast<volatile uint32_t*>(64) : p.out) = 1;
}

__global__ void division_by_zero(Probe p) { p.out[0] = 7 / (p.broken ? p.number : 1); }

// ---- Asynchronous copies. Thread i copies words 4 i to 4 i + 3.

__global__ void copy_not_waited_for(Probe p) {
    copy_async(word(thread_index() * 4), p.in);
    copy_async_commit();
    if (!p.broken) copy_async_wait<0>();
    p.out[thread_index()] = get(thread_index() * 4);
    copy_async_wait<0>();
}

__global__ void copy_waited_for_by_its_thread_alone(Probe p) {
    fill(4);
    copy_async(word(thread_index() * 4), p.in);
    copy_async_commit();
    copy_async_wait<0>();
    if (!p.broken) block_barrier();
    p.out[thread_index()] = get((thread_index() ^ p.number) * 4);
}

__global__ void barrier_before_the_wait(Probe p) {
    fill(4);
    copy_async(word(thread_index() * 4), p.in);
    copy_async_commit();
    if (p.broken) block_barrier();
    copy_async_wait<0>();
    if (!p.broken) block_barrier();
    p.out[thread_index()] = get((thread_index() ^ p.number) * 4);
}

__global__ void newest_group_not_waited_for(Probe p) {
    copy_async(word(thread_index() * 8), p.in);
    copy_async_commit();
    copy_async(word(thread_index() * 8 + 4), p.in);
    copy_async_commit();
    copy_async_wait<1>();
    p.out[thread_index()] = get(thread_index() * 8 + (p.broken ? 4 : 0));
    copy_async_wait<0>();
}

// A group without copies counts.
__global__ void empty_groups(Probe p) {
    copy_async(word(thread_index() * 4), p.in);
    copy_async_commit();
    if (!p.broken) copy_async_commit();
    copy_async_wait<1>();
    p.out[thread_index()] = get(thread_index() * 4);
    copy_async_wait<0>();
}

__global__ void copy_without_a_group(Probe p) {
    copy_async(word(thread_index() * 4), p.in);
    if (!p.broken) copy_async_commit();
    copy_async_wait<0>();
    p.out[thread_index()] = get(thread_index() * 4);
}

__global__ void ends_with_a_copy(Probe p) {
    copy_async(word(thread_index() * 4), p.in);
    copy_async_commit();
    if (!p.broken) copy_async_wait<0>();
}

__global__ void copy_over_what_others_read(Probe p) {
    put(thread_index());
    block_barrier();
    p.out[thread_index()] = get(thread_index() ^ p.number);
    if (!p.broken) block_barrier();
    if (thread_index() % 4 == 0) copy_async(word(thread_index()), p.in);
    copy_async_commit();
    copy_async_wait<0>();
}

__global__ void store_into_a_copy(Probe p) {
    copy_async(word(thread_index() * 4), p.in);
    copy_async_commit();
    if (!p.broken) copy_async_wait<0>();
    store_shared<uint32_t>(word(thread_index() * 4), 1);
    copy_async_wait<0>();
}

// ---- Clusters of two blocks

__global__ void cluster_read(Probe p) {
    fill(4);
    cluster_barrier();
    store_shared(shared_memory() + thread_index() * 16, make_uint4(block_index(), 2, 3, 4));
    p.broken ? block_barrier() : cluster_barrier();
    const uint4 other = load_cluster(shared_memory() + thread_index() * 16, 1 - cluster_rank());
    p.out[block_index() * block_threads() + thread_index()] = other.x;
    cluster_barrier();
}

__global__ void cluster_write_after_read(Probe p) {
    const SharedAddress mine = shared_memory() + thread_index() * 16;
    store_shared(mine, make_uint4(1, 2, 3, 4));
    cluster_barrier();
    p.out[thread_index()] = load_cluster(mine, 1 - cluster_rank()).x;
    p.broken ? block_barrier() : cluster_barrier();
    store_shared(mine, make_uint4(5, 6, 7, 8));
}

__global__ void cluster_block_ends(Probe p) {
    const SharedAddress mine = shared_memory() + thread_index() * 16;
    store_shared(mine, make_uint4(1, 2, 3, 4));
    cluster_barrier();
    if (cluster_rank() == p.number) p.out[thread_index()] = load_cluster(mine, 1 - p.number).x;
    if (!p.broken) cluster_barrier();
}

__global__ void cluster_barrier_left_out(Probe p) {
    if (!p.broken || cluster_rank() == p.number) cluster_barrier();
}

struct Entry {
    const char* name;
    void (*kernel)(Probe);
    Grid grid;
};

constexpr Grid kTwoWarps{1, 64, 512}, kWarp{1, 32, 512}, kCopies{1, 64, 2048};
constexpr Grid kTwoBlocks{2, 64, 512}, kCluster{4, 64, 1024, 2};

#define MNV2_PROBE(kernel, grid) {#kernel, kernel, grid}
const Entry entries[] = {
    MNV2_PROBE(read_after_write, kTwoWarps),
    MNV2_PROBE(write_after_read, kTwoWarps),
    MNV2_PROBE(write_after_write, kTwoWarps),
    MNV2_PROBE(read_other_lane, kTwoWarps),
    MNV2_PROBE(write_what_other_lane_reads, kTwoWarps),
    MNV2_PROBE(warp_barrier_between_warps, kTwoWarps),
    MNV2_PROBE(ldmatrix_is_no_barrier, kTwoWarps),
    MNV2_PROBE(ldmatrix_after_write, kTwoWarps),
    MNV2_PROBE(barrier_left_out_by_one, kTwoWarps),
    MNV2_PROBE(warp_barrier_left_out_by_one, kTwoWarps),
    MNV2_PROBE(lanes_at_different_collectives, kTwoWarps),
    MNV2_PROBE(lanes_at_different_barriers, kTwoWarps),
    MNV2_PROBE(store_past_the_end, kWarp),
    MNV2_PROBE(load_before_the_start, kTwoWarps),
    MNV2_PROBE(matrix_past_the_end, kTwoWarps),
    MNV2_PROBE(misaligned, kTwoWarps),
    MNV2_PROBE(misaligned_matrix, kTwoWarps),
    MNV2_PROBE(copy_from_misaligned, kCopies),
    MNV2_PROBE(read_of_nothing, kTwoWarps),
    MNV2_PROBE(matrix_of_nothing, kTwoWarps),
    MNV2_PROBE(read_what_the_last_block_wrote, kTwoBlocks),
    MNV2_PROBE(write_to_nowhere, kTwoWarps),
    MNV2_PROBE(division_by_zero, kTwoWarps),
    MNV2_PROBE(copy_not_waited_for, kCopies),
    MNV2_PROBE(copy_waited_for_by_its_thread_alone, kCopies),
    MNV2_PROBE(barrier_before_the_wait, kCopies),
    MNV2_PROBE(newest_group_not_waited_for, kCopies),
    MNV2_PROBE(empty_groups, kCopies),
    MNV2_PROBE(copy_without_a_group, kCopies),
    MNV2_PROBE(ends_with_a_copy, kCopies),
    MNV2_PROBE(copy_over_what_others_read, kTwoWarps),
    MNV2_PROBE(store_into_a_copy, kCopies),
    MNV2_PROBE(cluster_read, kCluster),
    MNV2_PROBE(cluster_write_after_read, kCluster),
    MNV2_PROBE(cluster_block_ends, kCluster),
    MNV2_PROBE(cluster_barrier_left_out, kCluster),
    {"x4", matrices<4, false>, kWarp},
    {"x2", matrices<2, false>, kWarp},
    {"x4 transposed", matrices<4, true>, kWarp},
    {"x2 transposed", matrices<2, true>, kWarp},
    {"x1 transposed", matrices<1, true>, kWarp},
    {"passes", passes, {1, 32, 16384}},
    {"half k16", product<__half, 16>, kWarp},
    {"half k8", product<__half, 8>, kWarp},
    {"bfloat16 k16", product<__nv_bfloat16, 16>, kWarp},
    {"bfloat16 k8", product<__nv_bfloat16, 8>, kWarp},
    {"half arithmetic", arithmetic<__half>, kWarp},
    {"bfloat16 arithmetic", arithmetic<__nv_bfloat16>, kWarp},
    {"half rounding", rounding<__half>, kWarp},
    {"bfloat16 rounding", rounding<__nv_bfloat16>, kWarp},
    {"copy with zeros", copy_with_zeros, kWarp},
};

}  // namespace

}  // namespace mnv2::cuda

// -1: there is no such probe.
extern "C" int mnv2_probe(const char* name, int broken, int number, const uint32_t* in,
                          uint32_t* out) {
    using namespace mnv2::cuda;
    for (const Entry& entry : entries)
        if (strcmp(entry.name, name) == 0)
            return launch(entry.kernel, entry.grid, Device{}, nullptr,
                          Probe{broken != 0, number, in, out});
    return -1;
}
