// Expansion and projection of the tile kernel: products of 16 x 16 by 16 x 8 matrices.
#pragma once
#include <type_traits>

#include "stage.cuh"

namespace mnv2::cuda::tile {

// Two floats, clipped and rounded. Relu: the lower bound is zero.
template <class T, bool Relu>
MNV2_DEVICE Pair clipped(float low, float high, const PairClip& clip) {
    if constexpr (Relu) return minimum<T>(pack_relu<T>(low, high), clip.upper);
    return minimum<T>(maximum<T>(pack<T>(low, high), clip.lower), clip.upper);
}

// The pixels under the tile, expanded to the channels of one slice, each to its place in the haloed
// tile. `part` is the warp's among those of the slice.
template <class T>
MNV2_DEVICE void expand(const TileCall& arguments, SharedAddress shared,
                        const ChunkWeights& weights, const float2 (&bias)[2], int slice, int part) {
    constexpr int rows = kTileUnitPixels / 16;
    const TilePlan& plan = arguments.plan;
    const int lane = thread_index() % 32;
    const int pixels = static_cast<int>(load_shared<uint32_t>(shared + plan.places));
    const SharedAddress w_expand =
        weights.w_expand + lane % 16 * plan.expand_pitch + slice * kTilePixelBytes + lane / 16 * 16;
    const SharedAddress x = shared + plan.x + lane / 16 * 16;
    const SharedAddress e = shared + plan.e + slice * plan.e_slice + lane % 4 * 8;
    const SharedAddress places = shared + plan.places + kTilePlacesHead + lane / 4 * 2;
    const PairClip clip = arguments.clip_expand;
    const float start[2][4] = {{bias[0].x, bias[0].y, bias[0].x, bias[0].y},
                               {bias[1].x, bias[1].y, bias[1].x, bias[1].y}};
#pragma unroll 1
    for (int first = part * kTileUnitPixels; first < pixels;
         first += plan.parts * kTileUnitPixels) {
        SharedAddress a_row[rows], b_row = w_expand;
        float sums[rows][2][4];
        Pair a[rows][4], b[4];
        load_matrices_transposed(b, b_row);
#pragma unroll
        for (int m = 0; m < rows; m++) {
            a_row[m] = x + min(first + m * 16 + lane % 16, pixels - 1) * plan.x_pitch;
            load_matrices(a[m], a_row[m]);
#pragma unroll
            for (int n = 0; n < 2; n++)
                multiply_add_k16<T>(sums[m][n], start[n], a[m], b[2 * n], b[2 * n + 1]);
        }
        const auto step = [&](int bytes) {
            b_row += plan.expand_pitch * 16;
            load_matrices_transposed(b, b_row);
#pragma unroll
            for (int m = 0; m < rows; m++) load_matrices(a[m], a_row[m] + bytes);
#pragma unroll
            for (int m = 0; m < rows; m++) {
#pragma unroll
                for (int n = 0; n < 2; n++)
                    multiply_add_k16<T>(sums[m][n], a[m], b[2 * n], b[2 * n + 1]);
            }
        };
        int k = 32;
#pragma unroll 1
        for (; k < plan.expand_rows; k += 32) {
            step(32);
            step(64);
#pragma unroll
            for (int m = 0; m < rows; m++) a_row[m] += 64;
        }
        if (k == plan.expand_rows) step(32);
        const auto store = [&](auto relu) {
#pragma unroll
            for (int m = 0; m < rows; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int place = load_shared<uint16_t>(places + (first + m * 16 + h * 8) * 2);
                    Pair pair[2];
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        pair[n] = clipped<T, decltype(relu)::value>(sums[m][n][2 * h],
                                                                    sums[m][n][2 * h + 1], clip);
                    store_shared(e + place * 16, make_uint2(pair[0], pair[1]));
                }
            }
        };
        if (arguments.relu) {
            store(std::true_type{});
        } else {
            store(std::false_type{});
        }
    }
}

// A warp's part of the projection. Its tiles of 16 pixels are warps_m apart, so that a tile of few
// pixels keeps all warps busy.
template <class T, int NTiles>
struct Projection {
    float sums[kTileRowsOfMatrices][NTiles][4];
    // Bytes from the start of d and of w_project to what this lane loads.
    int a_row[kTileRowsOfMatrices], b_row;
    int m_tiles;  // with pixels
    int channel;  // the first of this lane

    MNV2_DEVICE Projection(const Call& call, const TilePlan& plan, const Share& share) {
        const int lane = thread_index() % 32;
        const int tiles = (plan.pixels + 15) / 16 - share.m;
        m_tiles = (tiles + plan.warps_m - 1) / plan.warps_m;
        b_row = lane % 16 * plan.project_pitch + share.n * NTiles * 16;
        channel = share.first_out + share.n * NTiles * 8 + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < kTileRowsOfMatrices; m++)
            a_row[m] = opaque(lane / 16 * 16 +
                              min((share.m + m * plan.warps_m) * 16 + lane % 16, plan.pixels - 1) *
                                  plan.d_pitch);
#pragma unroll
        for (int n = 0; n < NTiles; n++) {
            float2 bias = make_float2(0.f, 0.f);
            if (call.b_project != nullptr && channel + n * 8 < call.out_channels)
                bias = two_floats(call.b_project + channel + n * 8);
#pragma unroll
            for (int m = 0; m < kTileRowsOfMatrices; m++) {
                sums[m][n][0] = sums[m][n][2] = bias.x;
                sums[m][n][1] = sums[m][n][3] = bias.y;
            }
        }
    }

    // Adds the products of one chunk: d has the results of the depthwise.
    MNV2_DEVICE void add(const TilePlan& plan, SharedAddress d, SharedAddress w_project,
                         int channels) {
        if (m_tiles <= 1) {
            add_rows<1>(plan, d, w_project, channels);
        } else if (m_tiles == 2) {
            add_rows<2>(plan, d, w_project, channels);
        } else if (m_tiles == 3) {
            add_rows<3>(plan, d, w_project, channels);
        } else {
            add_rows<4>(plan, d, w_project, channels);
        }
    }

    template <int Rows>
    MNV2_DEVICE void add_rows(const TilePlan& plan, SharedAddress d, SharedAddress w_project,
                              int channels) {
        const int lane = thread_index() % 32;
        w_project += b_row;
#pragma unroll 2
        for (int k = 0; k < channels; k += 16) {
            Pair b[NTiles][2];
#pragma unroll
            for (int n = 0; n + 1 < NTiles; n += 2) {
                Pair both[4];
                load_matrices_transposed(both, w_project + lane / 16 * 16 + n * 16);
                b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
            }
            if constexpr (NTiles % 2 == 1)
                load_matrices_transposed(b[NTiles - 1], w_project + (NTiles - 1) * 16);
            w_project += plan.project_pitch * 16;
#pragma unroll
            for (int m = 0; m < Rows; m++) {
                Pair a[4];
                load_matrices(a, d + a_row[m]);
#pragma unroll
                for (int n = 0; n < NTiles; n++)
                    multiply_add_k16<T>(sums[m][n], a, b[n][0], b[n][1]);
            }
            d += 32;
        }
    }

    // Clip, residual, rounding, and out.
    MNV2_DEVICE void store(const Call& call, const TilePlan& plan, const Share& share,
                           SharedAddress outputs) const {
        const int lane = thread_index() % 32, out = static_cast<int>(call.out_channels);
        const Clip clip = call.clip_project;
        const Position at = locate(call, plan);
        const int64_t first = (at.first_image * call.H_out + at.row) * call.W_out + at.col;
        const int64_t start = first * out + channel;
        const auto* x = static_cast<const uint16_t*>(call.x) + start;
        auto* y = static_cast<uint16_t*>(call.y) + start;
#pragma unroll
        for (int m = 0; m < kTileRowsOfMatrices; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int pixel = (share.m + m * plan.warps_m) * 16 + h * 8 + lane / 4;
                if (pixel >= plan.pixels) continue;
                const auto of_y = static_cast<int>(load_shared<uint32_t>(outputs + pixel * 4));
                if (of_y < 0) continue;
                const int64_t from = static_cast<int64_t>(of_y) * out;
                Pair added[NTiles] = {};
                if (call.residual) {
#pragma unroll
                    for (int n = 0; n < NTiles; n++)
                        if (channel + n * 8 < out)
                            added[n] = *reinterpret_cast<const Pair*>(x + from + n * 8);
                }
#pragma unroll
                for (int n = 0; n < NTiles; n++) {
                    float low = minimum(maximum(sums[m][n][2 * h], clip.lower), clip.upper);
                    float high = minimum(maximum(sums[m][n][2 * h + 1], clip.lower), clip.upper);
                    if (call.residual) low += unpack<T>(added[n]).x, high += unpack<T>(added[n]).y;
                    if (channel + n * 8 < out)
                        *reinterpret_cast<Pair*>(y + from + n * 8) = pack<T>(low, high);
                }
            }
        }
    }
};

}  // namespace mnv2::cuda::tile
