// The patch kernel: every group of four lanes owns a patch of output pixels, whose expanded values
// and depthwise sums never leave its registers.
//
// A warp expands pixels of eight patches at once. Rows g and g + 8 of a matrix product are pixels
// 2 i and 2 i + 1 of patch g, so that its result gives lane (g, t) two hidden channels of pixels of
// its own patch: the depthwise needs neither shuffles nor shared memory. And its sums lie where the
// projection wants the operand. Shared memory holds a tile of x and all weights. Without an
// expansion a lane reads its channels of x from there.
#include <algorithm>

#include "../kernels.h"
#include "../launch.h"
#include "../pairs.h"
#include "../ptx.h"
#include "../remember.h"
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

// Clip, residual: a lane's part of one patch, two channels of every 8 a time.
template <class T, class Sizes>
MNV2_DEVICE void store_patch(const Call& call, const PatchTile& tile, const Position& at, int t,
                             SharedAddress x,
                             float (&sums)[Sizes::kPixels / 2][Sizes::kOutTiles][4]) {
    const Clip clip = call.clip_project;
    if (clip.lower != -INFINITY || clip.upper != INFINITY) {
#pragma unroll
        for (int i = 0; i < Sizes::kPixels / 2 * Sizes::kOutTiles * 4; i++) {
            float& v = sums[i / 4 / Sizes::kOutTiles][i / 4 % Sizes::kOutTiles][i % 4];
            v = minimum(maximum(v, clip.lower), clip.upper);
        }
    }
    if (Sizes::kStride == 1 && call.residual) {
        const int pad_top = static_cast<int>(call.pad_top);
        const int pad_left = static_cast<int>(call.pad_left);
#pragma unroll
        for (int p = 0; p < Sizes::kPixels; p++) {
            const SharedAddress pixel =
                x + 4 * t +
                tile_offset<Sizes>(tile, p / Sizes::kCols + pad_top, p % Sizes::kCols + pad_left);
#pragma unroll
            for (int j = 0; j < Sizes::kOutTiles && j < Sizes::kInOctets; j++) {
                const float2 residual = unpack<T>(load_shared<uint32_t>(pixel + 16 * j));
                sums[p / 2][j][p % 2 * 2] += residual.x;
                sums[p / 2][j][p % 2 * 2 + 1] += residual.y;
            }
        }
    }
    const int channels = static_cast<int>(call.out_channels);
    const int rows = static_cast<int>(call.H_out) - at.row;
    const int cols = static_cast<int>(call.W_out) - at.col;
    const int64_t first = (at.image * call.H_out + at.row) * call.W_out + at.col;
    auto* y = static_cast<uint16_t*>(call.y) + first * channels + 2 * t;
    const int row_elements = static_cast<int>(call.W_out) * channels;
#pragma unroll
    for (int p = 0; p < Sizes::kPixels; p++) {
        const int row = p / Sizes::kCols, col = p % Sizes::kCols;
        auto* const pixel = reinterpret_cast<Pair*>(y + row * row_elements + col * channels);
        const int there = col < cols ? channels : 0;
#pragma unroll
        for (int j = 0; j < Sizes::kOutTiles; j++) {
            const float* const v = sums[p / 2][j] + p % 2 * 2;
            if (row < rows && j * 8 < there) pixel[j * 4] = pack<T>(v[0], v[1]);
        }
    }
}

// All hidden channels of the patches of a warp, added to the sums of the outputs.
template <class T, class Sizes>
MNV2_DEVICE void add_chunks(const PatchCall& arguments, ChunkAddresses chunk, SharedAddress pixels,
                            int lane, const InsideOf<T, Sizes>& inside,
                            float (&sums)[Sizes::kPixels / 2][Sizes::kOutTiles][4]) {
#pragma unroll 1
    for (int left = arguments.weights.chunks; left > 0; left--) {
        Depthwise<T, Sizes> depthwise;
        depthwise.start(chunk);
        // Sums of these are not worth registers from one chunk to the next.
        PatchTile pitches = arguments.tile;
        pitches.row_pitch = opaque(pitches.row_pitch);
        pitches.patch_row_pitch = opaque(pitches.patch_row_pitch);
        if constexpr (Sizes::kExpands) {
            Expansion<Sizes> expansion;
            expansion.start(chunk);
#pragma unroll
            for (int pair = 0; pair < Sizes::kSlotRows * Sizes::kSlotCols / 2; pair++) {
                const int row = 2 * pair / Sizes::kSlotCols, col = 2 * pair % Sizes::kSlotCols;
                expand_pair(pair, pixels + tile_offset<Sizes>(pitches, row, col), expansion, inside,
                            depthwise);
            }
        } else {
            const int hidden = static_cast<int>(arguments.call.hidden_channels);
            const bool twice = left == 1 && hidden % kPatchChunk != 0 && lane % 4 >= 2;
            const SharedAddress first = twice ? pixels - 16 : pixels;
#pragma unroll
            for (int row = 0; row < Sizes::kSlotRows; row++)
                add_row(row, first + tile_offset<Sizes>(pitches, row, 0), depthwise);
            pixels += kPatchChunk * 2;
        }
        project<T, Sizes>(chunk, arguments.uppers, depthwise, sums);
        chunk.advance<Sizes>();
    }
}

template <class T, class Sizes, int BlocksPerMultiprocessor>
__global__ void __launch_bounds__(kPatchThreads, BlocksPerMultiprocessor)
    inverted_residual_patch(const __grid_constant__ PatchCall arguments) {
    const Call& call = arguments.call;
    const PatchTile& tile = arguments.tile;
    const PatchWeights& weights = arguments.weights;
    const SharedAddress shared = shared_memory(), x_tile = shared + weights.end;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;

    if constexpr (Sizes::kExpands) stage_expand<Sizes>(call, weights, shared + weights.expand);
    stage_lanes<T, Sizes>(call, weights, shared + weights.of_lanes);
    stage_project<T, Sizes>(call, weights, shared + weights.project);
    stage_bias<Sizes>(call, shared + weights.bias);

    ChunkAddresses chunk;
    chunk.start<Sizes>(weights, shared, lane);
    const int patches = tile.patch_cols * tile.patch_rows;
    int unit = warp;
    for (int number = block_index(); number < arguments.tiles; number += grid_blocks()) {
        const Position corner = position<Sizes>(tile, number);
        stage_x<Sizes>(call, tile, corner, x_tile);
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();

        // Those with an output pixel.
        const int rows_left = (static_cast<int>(call.H_out) - corner.row - 1) / Sizes::kRows + 1;
        const int units = (min(patches, rows_left * tile.patch_cols) - 1) / kPatchesPerUnit + 1;
#pragma unroll 1
        for (; unit < units; unit += kPatchWarps) {
            // Patches that the tile does not have read those of the last one.
            const int first = unit * kPatchesPerUnit;
            const int patch = min(first + lane / 4, patches - 1);
            const SharedAddress own_pixels = patch_address<Sizes>(tile, patch, x_tile);
            SharedAddress pixels = own_pixels + lane % 4 * 8;
            if constexpr (Sizes::kExpands) {
                // Of ldmatrix: matrices 1 and 3 are the second pixel of a pair, 2 and 3 the upper 8
                // channels.
                const int loaded = min(first + lane % 8, patches - 1);
                pixels = patch_address<Sizes>(tile, loaded, x_tile) +
                         lane / 8 % 2 * Sizes::kIn * 2 + lane / 16 * 16;
            }
            Position at = corner;
            at.row += patch / tile.patch_cols * Sizes::kRows;
            at.col += patch % tile.patch_cols * Sizes::kCols;
            InsideOf<T, Sizes> inside;
            inside.start(call, at.row * Sizes::kStride - static_cast<int>(call.pad_top),
                         at.col * Sizes::kStride - static_cast<int>(call.pad_left),
                         Depthwise<T, Sizes>::expanded_upper(arguments.uppers));

            float sums[Sizes::kPixels / 2][Sizes::kOutTiles][4];
#pragma unroll
            for (int j = 0; j < Sizes::kOutTiles; j++) {
                const auto bias =
                    load_shared<float2>(shared + weights.bias + j * 32 + lane % 4 * 8);
#pragma unroll
                for (int i = 0; i < Sizes::kPixels / 2; i++) {
                    sums[i][j][0] = sums[i][j][2] = bias.x;
                    sums[i][j][1] = sums[i][j][3] = bias.y;
                }
            }
            add_chunks<T, Sizes>(arguments, chunk, pixels, lane, inside, sums);
            if (first + lane / 4 < patches)
                store_patch<T, Sizes>(call, tile, at, lane % 4, own_pixels, sums);
        }
        // The next tile begins with the warp whose turn it is.
        unit -= units;
        block_barrier();
    }
}

template <class T, class Sizes>
cudaError_t launch_patch(const Call& call, const PatchTile& tile, const Device& device,
                         cudaStream_t stream) {
    // As many as have registers: 255 a thread where there are 2.
    constexpr int blocks = Sizes::kPixels == 2 ? 3 : 2;
    const int64_t tiles = call.N * tile.tile_cols * tile.tile_rows;
    // More do not fit into a GPU's memory.
    if (tile.patch_cols == 0 || tiles > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    const Uppers uppers{call.clip_expand.upper, twice<T>(call.clip_expand.upper),
                        twice<T>(call.clip_dw.upper)};
    const PatchCall arguments{call, tile, patch_weights<Sizes>(call.hidden_channels), uppers,
                              static_cast<int>(tiles)};
    const int shared_bytes = arguments.weights.end + tile.x_elements * 2;
    const int resident = std::min(blocks, device.shared_bytes / shared_bytes);
    const Grid grid{std::min(arguments.tiles, resident * device.multiprocessors), kPatchThreads,
                    shared_bytes};
    return launch(inverted_residual_patch<T, Sizes, blocks>, grid, device, stream, arguments);
}

template <class T, bool HalfSums>
cudaError_t run_element(const Call& call, const Device& device, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    with_patch_sizes<HalfSums>(call, [&](auto sizes) {
        using Large = decltype(sizes);
        using Small = SmallPatches<Large>;
        struct Plan {
            bool is_small;
            PatchTile tile;
        };
        const Plan& plan = remembered<Plan>(call, call.element, device, [&] {
            const auto large = best_patch_tile<Large>(call, device);
            const auto small = best_patch_tile<Small>(call, device);
            return large.cost <= small.cost ? Plan{false, large.tile} : Plan{true, small.tile};
        });
        error = plan.is_small ? launch_patch<T, Small>(call, plan.tile, device, stream)
                              : launch_patch<T, Large>(call, plan.tile, device, stream);
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
