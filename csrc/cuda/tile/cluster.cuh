// The tile kernel for small batches: a cluster of blocks shares a tile.
//
// Every block computes the depthwise of its own chunks of hidden channels and the projection to its
// own output channels, so that no weight is read twice. Between the two they exchange the results
// of the depthwise. Each output is still the sum over all chunks in their order, in one block: the
// same bits as without a cluster.
#pragma once
#include "depthwise.cuh"

namespace mnv2::cuda::tile {

constexpr int kGatherBatch = 4;  // loads from other blocks that a thread has under way

// Copies the chunks `first` and on, one of each block, to this block.
MNV2_DEVICE void gather(const Call& call, const TilePlan& plan, SharedAddress shared, int first) {
    constexpr int lanes = 16;  // of a pixel, 4 channels each
    const int channel = thread_index() % lanes * 4, step = block_threads() / lanes;
    const int rows = min(plan.cluster, plan.chunks - first) * plan.pixels;
#pragma unroll 1
    for (int row = thread_index() / lanes; row < rows; row += kGatherBatch * step) {
        float2 value[kGatherBatch];
#pragma unroll
        for (int i = 0; i < kGatherBatch; i++) {
            const int rank = (row + i * step) / plan.pixels, pixel = (row + i * step) % plan.pixels;
            if (row + i * step < rows && channel < padded_channels(call, plan, first + rank))
                value[i] =
                    load_cluster(shared + plan.d + (pixel * plan.d_pitch + channel) * 2, rank);
        }
#pragma unroll
        for (int i = 0; i < kGatherBatch; i++) {
            const int rank = (row + i * step) / plan.pixels;
            if (row + i * step < rows && channel < padded_channels(call, plan, first + rank))
                store_shared(
                    shared + plan.gathered + ((row + i * step) * plan.d_pitch + channel) * 2,
                    value[i]);
        }
    }
}

// The weights of the projection for the chunks `first` and on, one of each block.
MNV2_DEVICE void stage_round_weights(const Call& call, const TilePlan& plan, SharedAddress shared,
                                     int first) {
    const int channel = first * plan.chunk;
    stage_project_weights(
        call, plan, channel,
        min(plan.cluster * plan.chunk, static_cast<int>(call.hidden_channels) - channel),
        shared + plan.w_project);
}

template <class T, int KernelSize, bool HalfSums>
__global__ void __launch_bounds__(kTileClusterWarps * 32)
    inverted_residual_tile_cluster(const __grid_constant__ TileCall arguments) {
    const Call& call = arguments.call;
    const TilePlan& plan = arguments.plan;
    const SharedAddress shared = shared_memory();
    const int rank = cluster_rank();

    stage_expand_weights(call, plan, shared, rank);
    start_tile(call, plan, shared, rank);
    copy_async_commit();
    stage_round_weights(call, plan, shared, 0);
    copy_async_commit();
    copy_async_wait<1>();

    Projection<T, 2> projection;
    for (int first = 0; first < plan.chunks; first += plan.cluster) {
        const int chunk = first + rank;
        block_barrier();
        if (first > 0) {
            stage_round_weights(call, plan, shared, first);
            copy_async_commit();
        }
        if (chunk < plan.chunks) {
            if (call.expansion) {
                expand<T>(arguments, shared, chunk);
            } else if (first > 0) {
                stage_expanded(call, plan, chunk, shared + plan.e);
                copy_async_commit();
                copy_async_wait<0>();
            }
            block_barrier();
            depthwise_of_chunk<T, KernelSize, HalfSums>(arguments, shared, chunk);
        }
        cluster_barrier();
        if (chunk + plan.cluster < plan.chunks)
            stage_expand_weights(call, plan, shared, chunk + plan.cluster);
        copy_async_commit();
        gather(call, plan, shared, first);
        copy_async_wait<1>();
        cluster_barrier();
#pragma unroll 1
        for (int i = 0; i < min(plan.cluster, plan.chunks - first); i++)
            projection.add(plan, shared + plan.gathered + i * plan.d_bytes,
                           shared + plan.w_project + i * plan.project_bytes,
                           channels_of_chunk(call, plan, first + i));
        copy_async_wait<0>();
    }
    projection.store(call, plan);
}

}  // namespace mnv2::cuda::tile
