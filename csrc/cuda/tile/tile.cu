// The tile kernel: a tile of the image in shared memory, where the three convolutions pass a chunk
// of hidden channels at a time from one to the next.
//
// Expansion and projection are matrix products on tensor cores; the sums of the projection stay in
// registers over all chunks. A warp expands 16 channels of a chunk and convolves them by itself.
// What it has of the depthwise, all warps project: that is the one barrier of a chunk, behind which
// the projection of a chunk and the expansion of the next one overlap. Without expansion the pixels
// of x themselves are copied to the haloed tile.
#include "../kernels.h"
#include "../launch.h"
#include "../pairs.h"
#include "../remember.h"
#include "choice.h"
#include "cluster.cuh"

namespace mnv2::cuda {

namespace tile {

template <class T, int KernelSize, bool HalfSums, int NTiles>
__global__ void __launch_bounds__(kTileMostWarps * 32,
                                  tile_most_warps(HalfSums, NTiles) / kTileMostWarps)
    inverted_residual_tile(const __grid_constant__ TileCall arguments) {
    const Call& call = arguments.call;
    const TilePlan& plan = arguments.plan;
    const SharedAddress shared = shared_memory();
    const Share mine = share(plan);

    const Copies c = copies(call, plan, mine);
    stage_expand_weights(call, plan, c, chunk_weights(plan, shared, 0), 0);
    start_tile(call, plan, shared, 0);
    copy_async_commit();

    Projection<T, NTiles> projection(call, plan, mine);
    // Everything that is written while another warp may still read the last one is there twice.
    for (int chunk = 0;; chunk++) {
        const int buffer = chunk % 2;
        copy_async_wait<0>();
        block_barrier();
        if (chunk < plan.chunks) {
            if (chunk + 1 < plan.chunks) {
                stage_expand_weights(call, plan, c, chunk_weights(plan, shared, 1 - buffer),
                                     chunk + 1);
                if (!call.expansion)
                    stage_expanded(call, plan, chunk + 1,
                                   shared + plan.e + (1 - buffer) * plan.e_bytes);
            }
            stage_project_weights<NTiles>(call, plan, c, mine.first_out, chunk * plan.chunk,
                                          channels_of_chunk(call, plan, chunk),
                                          chunk_weights(plan, shared, buffer).w_project);
            copy_async_commit();
        }
        const ChunkBiases biases = load_biases(call, plan, mine.slice, chunk);
        if (chunk > 0)
            projection.add(plan, shared + plan.d + (1 - buffer) * plan.d_bytes,
                           chunk_weights(plan, shared, 1 - buffer).w_project,
                           channels_of_chunk(call, plan, chunk - 1));
        if (chunk == plan.chunks) break;
        hidden_chunk<T, KernelSize, HalfSums>(
            arguments, shared, chunk_weights(plan, shared, buffer), biases,
            shared + plan.e + (call.expansion ? 0 : buffer * plan.e_bytes),
            shared + plan.d + buffer * plan.d_bytes, channels_of_chunk(call, plan, chunk), mine);
    }
    projection.store(call, plan, mine, shared + plan.outputs);
}

template <class T>
PairClip pair_clip(const Clip& clip) {
    return {twice<T>(clip.lower), twice<T>(clip.upper)};
}

template <class T, int KernelSize, bool HalfSums>
cudaError_t launch_tile(const Call& call, const Device& device, cudaStream_t stream) {
    const auto make = [&] { return plan_tile(call, call.element, device); };
    const TileCall arguments{call, remembered<TilePlan>(call, call.element, device, make),
                             pair_clip<T>(call.clip_expand), pair_clip<T>(call.clip_dw),
                             call.clip_expand.lower == 0 && call.clip_dw.lower == 0};
    const TilePlan& plan = arguments.plan;
    if (plan.end == 0) return cudaErrorInvalidConfiguration;
    const Grid grid{count_tiles(call, plan) * plan.groups, plan.warps() * 32, plan.end,
                    plan.cluster};
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
            return launch(inverted_residual_tile<T, KernelSize, HalfSums, 5>, grid, device, stream,
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
