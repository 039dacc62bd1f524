// The patch kernel: every group of four lanes owns a patch of output pixels, whose expanded values
// and depthwise sums never leave its registers.
//
// A warp expands pixels of eight patches at once. Rows g and g + 8 of a matrix product are pixels
// 2 i and 2 i + 1 of patch g, so that its result gives lane (g, t) two hidden channels of pixels of
// its own patch: the depthwise needs neither shuffles nor shared memory. And its sums lie where the
// projection wants the operand. Shared memory holds a tile of x and all weights.
#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "patch_math.cuh"
#include "patch_plan.h"
#include "patch_stage.cuh"
#include "ptx.h"

namespace mnv2::cuda {

namespace {

struct PatchCall {
    Call call;
    PatchTile tile;
    PatchWeights weights;
    int64_t tiles;  // of all images
};

// Bias, clip, residual: a lane's part of one patch, two channels of every 8 a time.
template <class T, class Sizes>
MNV2_DEVICE void store_patch(const Call& call, const PatchTile& tile, int64_t image, int64_t row,
                             int64_t col, int t, SharedAddress x,
                             const float (&sums)[Sizes::kPixels / 2][Sizes::kOutTiles][4]) {
    auto* y = static_cast<uint16_t*>(call.y);
#pragma unroll
    for (int j = 0; j < Sizes::kOutTiles; j++) {
        const int channel = j * 8 + t * 2;
        if (channel >= call.out_channels) continue;
        float2 bias = make_float2(0.f, 0.f);
        if (call.b_project != nullptr)
            bias = *reinterpret_cast<const float2*>(call.b_project + channel);
#pragma unroll
        for (int p = 0; p < Sizes::kPixels; p++) {
            const int p_row = p / Sizes::kCols, p_col = p % Sizes::kCols;
            if (row + p_row >= call.H_out || col + p_col >= call.W_out) continue;
            float2 v = make_float2(sums[p / 2][j][p % 2 * 2] + bias.x,
                                   sums[p / 2][j][p % 2 * 2 + 1] + bias.y);
            v.x = minimum(maximum(v.x, call.clip_project.lower), call.clip_project.upper);
            v.y = minimum(maximum(v.y, call.clip_project.lower), call.clip_project.upper);
            if (Sizes::kStride == 1 && call.residual) {
                const int x_row = p_row + static_cast<int>(call.pad_top);
                const int x_col = p_col + static_cast<int>(call.pad_left);
                const int offset = x_row / Sizes::kStepRows * tile.patch_row_pitch +
                                   x_row % Sizes::kStepRows * tile.row_pitch +
                                   Sizes::slot_col(x_col) + channel;
                const float2 residual = unpack<T>(load_shared<uint32_t>(x + 2 * offset));
                v.x += residual.x, v.y += residual.y;
            }
            const int64_t pixel = (image * call.H_out + row + p_row) * call.W_out + col + p_col;
            *reinterpret_cast<Pair*>(y + pixel * call.out_channels + channel) = pack<T>(v.x, v.y);
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
    const int g = lane / 4, t = lane % 4;
    const float upper_expand = call.clip_expand.upper, upper_dw = call.clip_dw.upper;

    stage_expand<T, Sizes>(call, weights, shared + weights.expand);
    stage_depthwise<T, HalfSums>(call, weights, shared + weights.dw);
    stage_project<Sizes>(call, weights, shared + weights.project);

    const auto patch_at = [&](int patch) {
        return x_tile + 2 * (patch / tile.patch_cols * tile.patch_row_pitch +
                             patch % tile.patch_cols * Sizes::kPatchPitch);
    };
    // The patches of a warp that the tile does not have read those of the last one.
    const int patches = tile.patch_cols * tile.patch_rows;
    const int patch = warp * kPatchesPerWarp + g;
    const int loaded = min(warp * kPatchesPerWarp + lane % 8, patches - 1);
    // Of ldmatrix: matrices 0 and 2 are the first pixel of a pair, 2 and 3 the upper 8 channels.
    const SharedAddress pixels =
        patch_at(loaded) + lane / 8 % 2 * Sizes::kPixelPitch * 2 + lane / 16 * 16;

    for (int64_t number = block_index(); number < arguments.tiles; number += grid_blocks()) {
        const int64_t tiles_per_image = static_cast<int64_t>(tile.tile_cols) * tile.tile_rows;
        const int64_t image = number / tiles_per_image;
        const int in_image = static_cast<int>(number % tiles_per_image);
        const int64_t first_row =
            in_image / tile.tile_cols * int64_t{tile.patch_rows} * Sizes::kRows;
        const int64_t first_col =
            in_image % tile.tile_cols * int64_t{tile.patch_cols} * Sizes::kCols;
        stage_x<T, Sizes>(call, tile, image, first_row * Sizes::kStride - call.pad_top,
                          first_col * Sizes::kStride - call.pad_left, x_tile);
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();

        // Whether any patch of the warp has an output pixel.
        const int64_t rows_left = (call.H_out - first_row - 1) / Sizes::kRows + 1;
        if (warp * kPatchesPerWarp < min(int64_t{patches}, rows_left * tile.patch_cols)) {
            float sums[Sizes::kPixels / 2][Sizes::kOutTiles][4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < weights.chunks; chunk++) {
                Depthwise<T, Sizes, HalfSums> depthwise;
                uint32_t w_expand[2][6];
                load_expand<Sizes>(
                    shared + weights.expand + chunk * kPatchChunk * Sizes::kExpandRows * 2, lane,
                    w_expand);
                depthwise.start(shared + weights.dw + chunk * weights.dw_chunk, t);
#pragma unroll
                for (int pair = 0; pair < Sizes::kSlotRows * Sizes::kSlotCols / 2; pair++) {
                    const int row = 2 * pair / Sizes::kSlotCols, col = 2 * pair % Sizes::kSlotCols;
                    const int offset = row / Sizes::kStepRows * tile.patch_row_pitch +
                                       row % Sizes::kStepRows * tile.row_pitch +
                                       Sizes::slot_col(col);
                    expand_pair<T, Sizes, HalfSums>(pair, pixels + 2 * offset, w_expand,
                                                    upper_expand, depthwise);
                }
                project<T, Sizes, HalfSums>(
                    shared + weights.project + chunk * kPatchChunk * Sizes::kOut * 2, lane,
                    upper_dw, depthwise, sums);
            }
            if (patch < patches) {
                const int64_t row = first_row + patch / tile.patch_cols * Sizes::kRows;
                const int64_t col = first_col + patch % tile.patch_cols * Sizes::kCols;
                store_patch<T, Sizes>(call, tile, image, row, col, t, patch_at(patch), sums);
            }
        }
        block_barrier();
    }
}
template <class T, class Sizes, bool HalfSums>
cudaError_t launch_patch(const Call& call, const Device& device, cudaStream_t stream) {
    // As many as have registers: 255 a thread where there are 2.
    constexpr int blocks = Sizes::kPixels * Sizes::kOutTiles <= 16 ? 3 : 2;
    PatchCall arguments{};
    arguments.call = call;
    arguments.weights = patch_weights<Sizes>(call.hidden_channels, HalfSums);
    arguments.tile = best_patch_tile<Sizes>(call, arguments.weights.end);
    arguments.tiles = call.N * arguments.tile.tile_cols * arguments.tile.tile_rows;
    const int shared_bytes = arguments.weights.end + arguments.tile.x_elements * 2;
    const int64_t resident = std::min(blocks, device.shared_bytes / shared_bytes);
    const Grid grid{std::min(arguments.tiles, resident * device.multiprocessors), kPatchThreads,
                    shared_bytes};
    return launch(inverted_residual_patch<T, Sizes, HalfSums, blocks>, grid, stream, arguments);
}

}  // namespace

cudaError_t run_patch(const Call& call, const Device& device, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    if (half_sums(call, call.element))
        with_patch_sizes<true>(call, [&](auto sizes) {
            error = launch_patch<__half, decltype(sizes), true>(call, device, stream);
        });
    else if (call.element == Element::half)
        with_patch_sizes<false>(call, [&](auto sizes) {
            error = launch_patch<__half, decltype(sizes), false>(call, device, stream);
        });
    else
        with_patch_sizes<false>(call, [&](auto sizes) {
            error = launch_patch<__nv_bfloat16, decltype(sizes), false>(call, device, stream);
        });
    return error;
}

}  // namespace mnv2::cuda
