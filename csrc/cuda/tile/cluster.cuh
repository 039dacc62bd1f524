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
    const int octet = thread_index() % kCopyLanes, blocks = min(plan.cluster, plan.chunks - first);
    // The last chunk may have fewer channels.
    const int last =
        octet * 8 < padded(channels_of_chunk(call, plan, first + blocks - 1)) ? blocks : blocks - 1;
#pragma unroll 1
    for (int pixel = thread_index() / kCopyLanes; pixel < plan.pixels;
         pixel += block_threads() / kCopyLanes) {
        const SharedAddress place = shared + pixel * plan.d_pitch + octet * 16;
#pragma unroll 1
        for (int rank = 0; rank < last; rank += kGatherBatch) {
            uint4 value[kGatherBatch];
#pragma unroll
            for (int i = 0; i < kGatherBatch; i++)
                if (rank + i < last) value[i] = load_cluster(place + plan.d, rank + i);
#pragma unroll
            for (int i = 0; i < kGatherBatch; i++)
                if (rank + i < last)
                    store_shared(place + plan.gathered + (rank + i) * plan.d_bytes, value[i]);
        }
    }
}

// The weights of the projection for the chunks `first` and on, one of each block.
MNV2_DEVICE void stage_round_weights(const Call& call, const TilePlan& plan, const Copies& c,
                                     SharedAddress shared, int first_out, int first) {
    const int channel = first * plan.chunk;
    stage_project_weights<2>(
        call, plan, c, first_out, channel,
        min(plan.cluster * plan.chunk, static_cast<int>(call.hidden_channels) - channel),
        shared + plan.w_project);
}

template <class T, int KernelSize, bool HalfSums>
__global__ void __launch_bounds__(kTileMostWarps * 32)
    inverted_residual_tile_cluster(const __grid_constant__ TileCall arguments) {
    const Call& call = arguments.call;
    const TilePlan& plan = arguments.plan;
    const SharedAddress shared = shared_memory();
    const ChunkWeights weights = chunk_weights(plan, shared, 0);
    const Share mine = share(plan);
    const int rank = cluster_rank();
    const Copies c = copies(call, plan, mine);

    stage_expand_weights(call, plan, c, weights, rank);
    start_tile(call, plan, shared, rank);
    copy_async_commit();
    stage_round_weights(call, plan, c, shared, mine.first_out, 0);
    copy_async_commit();
    copy_async_wait<1>();

    Projection<T, 2> projection(call, plan, mine);
    for (int first = 0; first < plan.chunks; first += plan.cluster) {
        const int chunk = first + rank;
        const ChunkBiases biases = load_biases(call, plan, mine.slice, chunk);
        block_barrier();
        if (first > 0) {
            stage_round_weights(call, plan, c, shared, mine.first_out, first);
            copy_async_commit();
        }
        if (chunk < plan.chunks) {
            if (!call.expansion && first > 0) {
                stage_expanded(call, plan, chunk, shared + plan.e);
                copy_async_commit();
                copy_async_wait<0>();
                block_barrier();
            }
            hidden_chunk<T, KernelSize, HalfSums>(arguments, shared, weights, biases,
                                                  shared + plan.e, shared + plan.d,
                                                  channels_of_chunk(call, plan, chunk), mine);
        }
        cluster_barrier();
        if (chunk + plan.cluster < plan.chunks)
            stage_expand_weights(call, plan, c, weights, chunk + plan.cluster);
        copy_async_commit();
        gather(call, plan, shared, first);
        copy_async_wait<1>();
        cluster_barrier_relaxed();
        block_barrier();
#pragma unroll 1
        for (int i = 0; i < min(plan.cluster, plan.chunks - first); i++)
            projection.add(plan, shared + plan.gathered + i * plan.d_bytes,
                           weights.w_project + i * plan.project_bytes,
                           channels_of_chunk(call, plan, first + i));
        copy_async_wait<0>();
    }
    projection.store(call, plan, mine, shared + plan.outputs);
}

}  // namespace mnv2::cuda::tile
