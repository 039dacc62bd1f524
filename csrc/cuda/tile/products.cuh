// Expansion and projection of the tile kernel: products of 16 x 16 by 16 x 8 matrices.
#pragma once
#include "stage.cuh"

namespace mnv2::cuda::tile {

template <class T>
MNV2_DEVICE Pair clipped(Pair v, const PairClip& clip) {
    return minimum<T>(maximum<T>(v, clip.lower), clip.upper);
}

// One unit of the expansion: 32 pixels x 8 UnitTiles channels of a chunk.
template <class T, int UnitTiles>
MNV2_DEVICE void expand_unit(const TileCall& arguments, SharedAddress shared,
                             const ChunkWeights& weights, int pixels, int first_pixel,
                             int first_channel) {
    constexpr int rows = kTileUnitPixels / 16;
    const TilePlan& plan = arguments.plan;
    const int lane = thread_index() % 32;
    SharedAddress a_row[rows];
#pragma unroll
    for (int m = 0; m < rows; m++)
        a_row[m] = shared + plan.x + lane / 16 * 16 +
                   min(first_pixel + m * 16 + lane % 16, pixels - 1) * plan.x_pitch * 2;
    SharedAddress b_row =
        weights.w_expand + (lane % 16 * plan.expand_pitch + first_channel) * 2 + lane / 16 * 16;

    float sums[rows][UnitTiles][4];
#pragma unroll
    for (int n = 0; n < UnitTiles; n++) {
        const float2 bias =
            load_shared<float2>(weights.b_expand + (first_channel + n * 8 + lane % 4 * 2) * 4);
#pragma unroll
        for (int m = 0; m < rows; m++) {
            sums[m][n][0] = sums[m][n][2] = bias.x;
            sums[m][n][1] = sums[m][n][3] = bias.y;
        }
    }
#pragma unroll 1
    for (int k = 0; k < plan.expand_rows; k += 16) {
        Pair a[rows][4], b[UnitTiles / 2][4];
#pragma unroll
        for (int m = 0; m < rows; m++) load_matrices(a[m], a_row[m] + k * 2);
#pragma unroll
        for (int n = 0; n < UnitTiles / 2; n++) load_matrices_transposed(b[n], b_row + n * 32);
        b_row += plan.expand_pitch * 32;
#pragma unroll
        for (int n = 0; n < UnitTiles; n++) {
#pragma unroll
            for (int m = 0; m < rows; m++)
                multiply_add_k16<T>(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }

#pragma unroll
    for (int m = 0; m < rows; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int pixel = first_pixel + m * 16 + h * 8 + lane / 4;
            if (pixel >= pixels) continue;
            const int place =
                load_shared<uint16_t>(shared + plan.places + kTilePlacesHead + pixel * 2);
            const SharedAddress to =
                shared + plan.e + (place * plan.e_pitch + first_channel + lane % 4 * 2) * 2;
#pragma unroll
            for (int n = 0; n < UnitTiles; n++)
                store_shared(to + n * 16,
                             clipped<T>(pack<T>(sums[m][n][2 * h], sums[m][n][2 * h + 1]),
                                        arguments.clip_expand));
        }
    }
}

// Every pixel under the tile, expanded to the channels of a chunk, to its place in the haloed tile.
template <class T>
MNV2_DEVICE void expand(const TileCall& arguments, SharedAddress shared, int chunk) {
    const TilePlan& plan = arguments.plan;
    const ChunkWeights weights = chunk_weights(plan, shared, chunk);
    const int pixels = static_cast<int>(load_shared<uint32_t>(shared + plan.places));
    const int row_units = (pixels + kTileUnitPixels - 1) / kTileUnitPixels;
    const int units = row_units * (plan.chunk / (plan.unit_tiles * 8));
#pragma unroll 1
    for (int unit = thread_index() / 32; unit < units; unit += block_threads() / 32) {
        const int first_pixel = unit % row_units * kTileUnitPixels;
        const int first_channel = unit / row_units * plan.unit_tiles * 8;
        if (plan.unit_tiles == 4) {
            expand_unit<T, 4>(arguments, shared, weights, pixels, first_pixel, first_channel);
        } else {
            expand_unit<T, 2>(arguments, shared, weights, pixels, first_pixel, first_channel);
        }
    }
}

// A warp's part of the projection. Its tiles of 16 pixels are warps_m apart, so that a tile of few
// pixels keeps all warps busy.
template <class T, int NTiles>
struct Projection {
    float sums[kTileRowsOfMatrices][NTiles][4] = {};

    // Adds the products of one chunk: d has the results of the depthwise.
    MNV2_DEVICE void add(const TilePlan& plan, SharedAddress d, SharedAddress w_project,
                         int channels) {
        const int lane = thread_index() % 32, warp = thread_index() / 32;
        const int warp_m = warp % plan.warps_m, warp_n = warp / plan.warps_m;
        SharedAddress a_row[kTileRowsOfMatrices];
#pragma unroll
        for (int m = 0; m < kTileRowsOfMatrices; m++)
            a_row[m] = d + lane / 16 * 16 +
                       min((warp_m + m * plan.warps_m) * 16 + lane % 16, plan.pixels - 1) *
                           plan.d_pitch * 2;
        SharedAddress b_row =
            w_project + (lane % 16 * plan.project_pitch + warp_n * NTiles * 8) * 2;
        // Tiles from this warp's first one on, its own and those of others.
        const int tiles = (plan.pixels + 15) / 16 - warp_m;

#pragma unroll 1
        for (int k = 0; k < channels; k += 16) {
            Pair b[NTiles][2];
#pragma unroll
            for (int n = 0; n + 1 < NTiles; n += 2) {
                Pair both[4];
                load_matrices_transposed(both, b_row + lane / 16 * 16 + n * 16);
                b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
            }
            if constexpr (NTiles % 2 == 1)
                load_matrices_transposed(b[NTiles - 1], b_row + (NTiles - 1) * 16);
            b_row += plan.project_pitch * 32;
#pragma unroll
            for (int m = 0; m < kTileRowsOfMatrices; m++) {
                if (m > 0 && tiles <= m * plan.warps_m) break;
                Pair a[4];
                load_matrices(a, a_row[m] + k * 2);
#pragma unroll
                for (int n = 0; n < NTiles; n++)
                    multiply_add_k16<T>(sums[m][n], a, b[n][0], b[n][1]);
            }
        }
    }

    // Bias, clip, residual, rounding, and out.
    MNV2_DEVICE void store(const Call& call, const TilePlan& plan) const {
        const Position at = locate(call, plan);
        const int lane = thread_index() % 32, warp = thread_index() / 32;
        const int warp_m = warp % plan.warps_m, warp_n = warp / plan.warps_m;
        const int out = static_cast<int>(call.out_channels);
        const int first =
            output_group(plan) * plan.group_channels + warp_n * NTiles * 8 + lane % 4 * 2;
        const auto* x = static_cast<const uint16_t*>(call.x) + first;
        auto* y = static_cast<uint16_t*>(call.y) + first;
        float2 bias[NTiles];
#pragma unroll
        for (int n = 0; n < NTiles; n++) {
            bias[n] = make_float2(0.f, 0.f);
            if (call.b_project != nullptr && first + n * 8 < out)
                bias[n] =
                    make_float2(call.b_project[first + n * 8], call.b_project[first + n * 8 + 1]);
        }
#pragma unroll
        for (int m = 0; m < kTileRowsOfMatrices; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int pixel = (warp_m + m * plan.warps_m) * 16 + h * 8 + lane / 4;
                const int line = pixel / plan.cols, image = line / plan.rows;
                const int row = at.row + line % plan.rows, col = at.col + pixel % plan.cols;
                if (image >= at.images || row >= call.H_out || col >= call.W_out) continue;
                const int64_t from =
                    (((at.first_image + image) * call.H_out + row) * call.W_out + col) * out;
                Pair added[NTiles] = {};
                if (call.residual) {
#pragma unroll
                    for (int n = 0; n < NTiles; n++)
                        if (first + n * 8 < out)
                            added[n] = *reinterpret_cast<const Pair*>(x + from + n * 8);
                }
#pragma unroll
                for (int n = 0; n < NTiles; n++) {
                    const Clip clip = call.clip_project;
                    float low = sums[m][n][2 * h] + bias[n].x;
                    float high = sums[m][n][2 * h + 1] + bias[n].y;
                    low = minimum(maximum(low, clip.lower), clip.upper);
                    high = minimum(maximum(high, clip.lower), clip.upper);
                    if (call.residual) low += unpack<T>(added[n]).x, high += unpack<T>(added[n]).y;
                    if (first + n * 8 < out)
                        *reinterpret_cast<Pair*>(y + from + n * 8) = pack<T>(low, high);
                }
            }
        }
    }
};

}  // namespace mnv2::cuda::tile
