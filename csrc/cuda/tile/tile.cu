// The tile kernel: a tile of the image in shared memory, where the three convolutions pass a chunk
// of hidden channels at a time from one to the next.
//
// Expansion and projection are matrix products on tensor cores; the sums of the projection stay in
// registers over all chunks. Between them are the expanded tile, with a halo that is zero outside
// the image, and the result of the depthwise. The projection of a chunk and the expansion of
// the next need no barrier between them. Without expansion the pixels of x themselves are copied to
// the haloed tile.
#include "../kernels.h"
#include "../launch.h"
#include "../pairs.h"
#include "choice.h"
#include "cluster.cuh"

namespace mnv2::cuda {

namespace tile {

template <class T, int KernelSize, bool HalfSums, int NTiles>
__global__ void __launch_bounds__(tile_most_warps(KernelSize, HalfSums, NTiles) * 32)
    inverted_residual_tile(const __grid_constant__ TileCall arguments) {
    const Call& call = arguments.call;
    const TilePlan& plan = arguments.plan;
    const SharedAddress shared = shared_memory();

    stage_expand_weights(call, plan, shared, 0);
    start_tile(call, plan, shared, 0);
    copy_async_commit();

    // Two buffers are filled while both products run, one during the depthwise. It holds the
    // expansion of the next chunk and the projection of this one.
    const auto stage_next = [&](int chunk) {
        if (chunk + 1 < plan.chunks) stage_expand_weights(call, plan, shared, chunk + 1);
        stage_project_weights(call, plan, chunk * plan.chunk, channels_of_chunk(call, plan, chunk),
                              chunk_weights(plan, shared, chunk).w_project);
        copy_async_commit();
    };

    Projection<T, NTiles> projection;
    for (int chunk = 0;; chunk++) {
        const bool ends = chunk == plan.chunks;
        copy_async_wait<0>();
        block_barrier();
        if (!call.expansion && chunk > 0 && !ends) {
            stage_expanded(call, plan, chunk, shared + plan.e);
            copy_async_commit();
        }
        if (plan.buffers == 2 && !ends) stage_next(chunk);
        if (chunk > 0)
            projection.add(plan, shared + plan.d, chunk_weights(plan, shared, chunk - 1).w_project,
                           channels_of_chunk(call, plan, chunk - 1));
        if (ends) break;
        if (call.expansion) {
            expand<T>(arguments, shared, chunk);
        } else if (plan.buffers == 2) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        block_barrier();
        if (plan.buffers == 1) stage_next(chunk);
        depthwise_of_chunk<T, KernelSize, HalfSums>(arguments, shared, chunk);
    }
    projection.store(call, plan);
}

template <class T>
PairClip pair_clip(const Clip& clip) {
    return {twice<T>(clip.lower), twice<T>(clip.upper)};
}

template <class T, int KernelSize, bool HalfSums>
cudaError_t launch_tile(const Call& call, const Device& device, cudaStream_t stream) {
    static_assert(sizeof(typename Channels<T, HalfSums>::Packed) ==
                  2 * tile_job_channels(HalfSums));
    const TileCall arguments{call, known_plan(call, call.element, device),
                             pair_clip<T>(call.clip_expand), pair_clip<T>(call.clip_dw)};
    const TilePlan& plan = arguments.plan;
    if (plan.end == 0) return cudaErrorInvalidConfiguration;
    const Grid grid{count_tiles(call, plan) * plan.groups, plan.threads(), plan.end, plan.cluster};
    if (plan.cluster > 1)
        return launch(inverted_residual_tile_cluster<T, KernelSize, HalfSums>, grid, device, stream,
                      arguments);
    switch (plan.n_tiles) {
        case 2:
            return launch(inverted_residual_tile<T, KernelSize, HalfSums, 2>, grid, device, stream,
                          arguments);
        case 3:
            return launch(inverted_residual_tile<T, KernelSize, HalfSums, 3>, grid, device, stream,
                          arguments);
        default:
            return launch(inverted_residual_tile<T, KernelSize, HalfSums, 4>, grid, device, stream,
                          arguments);
    }
}

}  // namespace tile

cudaError_t run_tile(const Call& call, const Device& device, cudaStream_t stream) {
    const bool half = call.element == Element::half;
    if (half_sums(call, call.element))
        return tile::launch_tile<__half, 3, true>(call, device, stream);
    if (call.kernel_size == 3)
        return half ? tile::launch_tile<__half, 3, false>(call, device, stream)
                    : tile::launch_tile<__nv_bfloat16, 3, false>(call, device, stream);
    return half ? tile::launch_tile<__half, 5, false>(call, device, stream)
                : tile::launch_tile<__nv_bfloat16, 5, false>(call, device, stream);
}

}  // namespace mnv2::cuda
