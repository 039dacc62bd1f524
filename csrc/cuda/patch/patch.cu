// The patch kernel: every group of four lanes owns a patch of output pixels, whose expanded values
// and depthwise sums never leave its registers.
//
// A warp expands pixels of eight patches at once. Rows g and g + 8 of a matrix product are pixels
// 2 i and 2 i + 1 of patch g, so that its result gives lane (g, t) two hidden channels of pixels of
// its own patch: the depthwise needs neither shuffles nor shared memory. And its sums lie where the
// projection wants the operand. Shared memory holds a tile of x and all weights.
#include <algorithm>

#include "../kernels.h"
#include "../launch.h"
#include "../pairs.h"
#include "../ptx.h"
#include "math.cuh"
#include "plan.h"
#include "stage.cuh"

namespace mnv2::cuda {

namespace patch {

struct PatchCall {
    Call call;
    PatchTile tile;
    PatchWeights weights;
    Uppers uppers;
    int tiles;  // of all images
};

// Bias, clip, residual: a lane's part of one patch, two channels of every 8 a time.
template <class T, class Sizes>
MNV2_DEVICE void store_patch(const Call& call, const PatchTile& tile, const Position& at, int t,
                             SharedAddress x,
                             const float (&sums)[Sizes::kPixels / 2][Sizes::kOutTiles][4]) {
    const int64_t first = (at.image * call.H_out + at.row) * call.W_out + at.col;
    auto* y = static_cast<uint16_t*>(call.y) + first * call.out_channels + 2 * t;
#pragma unroll
    for (int p = 0; p < Sizes::kPixels; p++) {
        const int row = p / Sizes::kCols, col = p % Sizes::kCols;
        if (at.row + row >= call.H_out || at.col + col >= call.W_out) continue;
        uint16_t* const pixel = y + (row * call.W_out + col) * call.out_channels;
        const SharedAddress x_pixel =
            x + tile_offset<Sizes>(tile, row + static_cast<int>(call.pad_top),
                                   col + static_cast<int>(call.pad_left));
#pragma unroll
        for (int j = 0; j < Sizes::kOutTiles; j++) {
            const int channel = j * 8 + t * 2;
            if (channel >= call.out_channels) continue;
            float2 v = make_float2(sums[p / 2][j][p % 2 * 2], sums[p / 2][j][p % 2 * 2 + 1]);
            if (call.b_project != nullptr) {
                const auto bias = *reinterpret_cast<const float2*>(call.b_project + channel);
                v.x += bias.x, v.y += bias.y;
            }
            v.x = minimum(maximum(v.x, call.clip_project.lower), call.clip_project.upper);
            v.y = minimum(maximum(v.y, call.clip_project.lower), call.clip_project.upper);
            if (Sizes::kStride == 1 && call.residual) {
                const float2 residual = unpack<T>(load_shared<uint32_t>(x_pixel + 2 * channel));
                v.x += residual.x, v.y += residual.y;
            }
            *reinterpret_cast<Pair*>(pixel + j * 8) = pack<T>(v.x, v.y);
        }
    }
}

template <class T, class Sizes, bool HalfSums, int BlocksPerMultiprocessor>
__global__ void __launch_bounds__(kPatchThreads, BlocksPerMultiprocessor)
    inverted_residual_patch(const __grid_constant__ PatchCall arguments) {
    const Call& call = arguments.call;
    const PatchTile& tile = arguments.tile;
    const PatchWeights& weights = arguments.weights;
    const SharedAddress shared = shared_memory(), x_tile = shared + weights.end;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;

    stage_expand<T, Sizes>(call, weights, shared + weights.expand);
    stage_depthwise<T, HalfSums>(call, weights, shared + weights.dw);
    stage_project<T, Sizes>(call, weights, shared + weights.project);

    // The patches of a warp that the tile does not have read those of the last one.
    const int patches = tile.patch_cols * tile.patch_rows;
    const int patch = warp * kPatchesPerWarp + lane / 4;
    const int loaded = min(warp * kPatchesPerWarp + lane % 8, patches - 1);
    // Of ldmatrix: matrices 1 and 3 are the second pixel of a pair, 2 and 3 the upper 8 channels.
    const SharedAddress pixels = patch_address<Sizes>(tile, loaded, x_tile) +
                                 lane / 8 % 2 * Sizes::kPixelPitch * 2 + lane / 16 * 16;

    for (int number = block_index(); number < arguments.tiles; number += grid_blocks()) {
        Position at = position<Sizes>(tile, number);
        stage_x<T, Sizes>(call, tile, at, x_tile);
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();

        // Whether any patch of the warp has an output pixel.
        const int rows_left = (static_cast<int>(call.H_out) - at.row - 1) / Sizes::kRows + 1;
        if (warp * kPatchesPerWarp < min(patches, rows_left * tile.patch_cols)) {
            float sums[Sizes::kPixels / 2][Sizes::kOutTiles][4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < weights.chunks; chunk++) {
                Depthwise<T, Sizes, HalfSums> depthwise;
                uint32_t w_expand[2][6];
                load_expand<Sizes>(
                    shared + weights.expand + chunk * kPatchChunk * Sizes::kExpandRows * 2, lane,
                    w_expand);
                depthwise.start(shared + weights.dw + chunk * weights.dw_chunk, lane % 4);
                // Sums of these are not worth registers from one chunk to the next.
                PatchTile pitches = tile;
                pitches.row_pitch = opaque(tile.row_pitch);
                pitches.patch_row_pitch = opaque(tile.patch_row_pitch);
#pragma unroll
                for (int pair = 0; pair < Sizes::kSlotRows * Sizes::kSlotCols / 2; pair++) {
                    const int row = 2 * pair / Sizes::kSlotCols, col = 2 * pair % Sizes::kSlotCols;
                    expand_pair<T, Sizes, HalfSums>(pair,
                                                    pixels + tile_offset<Sizes>(pitches, row, col),
                                                    w_expand, arguments.uppers, depthwise);
                }
                project<T, Sizes, HalfSums>(
                    shared + weights.project + chunk * kPatchChunk * Sizes::kOut * 2, lane,
                    arguments.uppers, depthwise, sums);
            }
            if (patch < patches) {
                at = position<Sizes>(tile, number);
                at.row += patch / tile.patch_cols * Sizes::kRows;
                at.col += patch % tile.patch_cols * Sizes::kCols;
                store_patch<T, Sizes>(call, tile, at, lane % 4,
                                      patch_address<Sizes>(tile, patch, x_tile), sums);
            }
        }
        block_barrier();
    }
}

template <class Sizes>
PatchCall plan_patch(const Call& call, bool half_sums) {
    PatchCall arguments{};
    arguments.call = call;
    arguments.weights = patch_weights<Sizes>(call.hidden_channels, half_sums);
    arguments.tile = best_patch_tile<Sizes>(call, arguments.weights.end);
    const int64_t tiles = call.N * arguments.tile.tile_cols * arguments.tile.tile_rows;
    // More do not fit into a GPU's memory.
    arguments.tiles = static_cast<int>(std::min<int64_t>(tiles, INT32_MAX));
    return arguments;
}

template <class T, class Sizes, bool HalfSums>
cudaError_t launch_patch(PatchCall arguments, const Device& device, cudaStream_t stream) {
    // As many as have registers: 255 a thread where there are 2.
    constexpr int blocks = Sizes::kPixels * Sizes::kOutTiles <= 16 ? 3 : 2;
    const Call& call = arguments.call;
    arguments.uppers = {call.clip_expand.upper, twice<T>(call.clip_expand.upper),
                        twice<T>(call.clip_dw.upper)};
    if (arguments.tiles > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    const int shared_bytes = arguments.weights.end + arguments.tile.x_elements * 2;
    const int resident = std::min(blocks, device.shared_bytes / shared_bytes);
    const Grid grid{std::min(arguments.tiles, resident * device.multiprocessors), kPatchThreads,
                    shared_bytes};
    return launch(inverted_residual_patch<T, Sizes, HalfSums, blocks>, grid, device, stream,
                  arguments);
}

template <class T, bool HalfSums>
cudaError_t run_element(const Call& call, const Device& device, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    bool few = false;
    with_patch_sizes<HalfSums, false>(call, [&](auto sizes) {
        using Sizes = decltype(sizes);
        const PatchCall arguments = plan_patch<Sizes>(call, HalfSums);
        few = arguments.tiles <= device.multiprocessors;
        if (!few) error = launch_patch<T, Sizes, HalfSums>(arguments, device, stream);
    });
    if (few)
        with_patch_sizes<HalfSums, true>(call, [&](auto sizes) {
            using Sizes = decltype(sizes);
            error =
                launch_patch<T, Sizes, HalfSums>(plan_patch<Sizes>(call, HalfSums), device, stream);
        });
    return error;
}

}  // namespace patch

cudaError_t run_patch(const Call& call, const Device& device, cudaStream_t stream) {
    if (call.element == Element::bfloat16)
        return patch::run_element<__nv_bfloat16, false>(call, device, stream);
    if (half_sums(call, call.element))
        return patch::run_element<__half, true>(call, device, stream);
    return patch::run_element<__half, false>(call, device, stream);
}

}  // namespace mnv2::cuda
