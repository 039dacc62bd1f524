// What a warp of the patch kernel does with a chunk of the hidden channels, all of it in registers.
#pragma once
#include "../ptx.h"
#include "plan.h"

namespace mnv2::cuda::patch {

// Upper bounds of the expanded values and of the depthwise sums; the lower ones are 0.
struct Uppers {
    float expanded;
    Pair expanded_pair, sum_pair;
};

// The depthwise sums of a lane: two channels of every pixel of its patch, for each of the two
// groups of 8 channels in a chunk; in fp16, or in float.
template <class T, class Sizes, bool HalfSums>
struct Depthwise;

template <class T, class Sizes>
struct Depthwise<T, Sizes, true> {
    Pair weight[2][9], sum[2][Sizes::kPixels];

    // `chunk` holds its taps and bias.
    MNV2_DEVICE void start(SharedAddress chunk, int t) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int tap = 0; tap < 9; tap++)
                weight[h][tap] = load_shared<uint32_t>(chunk + tap * 32 + h * 16 + t * 4);
            const Pair bias = load_shared<uint32_t>(chunk + 9 * 32 + h * 16 + t * 4);
#pragma unroll
            for (int p = 0; p < Sizes::kPixels; p++) sum[h][p] = bias;
        }
    }

    MNV2_DEVICE static Pair clipped(float low, float high, const Uppers& upper) {
        return minimum<T>(pack_relu<T>(low, high), upper.expanded_pair);
    }
    MNV2_DEVICE void add(int h, int pixel, int tap, Pair expanded) {
        // Slots come row by row, so that tap 8 is the last one of every sum.
        sum[h][pixel] = tap == 8 ? multiply_add_relu<T>(expanded, weight[h][tap], sum[h][pixel])
                                 : multiply_add<T>(expanded, weight[h][tap], sum[h][pixel]);
    }
    MNV2_DEVICE Pair clipped_sum(int h, int pixel, const Uppers& upper) const {
        return minimum<T>(sum[h][pixel], upper.sum_pair);
    }
};

template <class T, class Sizes>
struct Depthwise<T, Sizes, false> {
    float2 weight[2][9], sum[2][Sizes::kPixels];

    MNV2_DEVICE void start(SharedAddress chunk, int t) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int tap = 0; tap < 9; tap++)
                weight[h][tap] =
                    unpack<T>(load_shared<uint32_t>(chunk + tap * 32 + h * 16 + t * 4));
            const float2 bias = load_shared<float2>(chunk + 9 * 32 + h * 32 + t * 8);
#pragma unroll
            for (int p = 0; p < Sizes::kPixels; p++) sum[h][p] = bias;
        }
    }

    MNV2_DEVICE static float2 clipped(float low, float high, const Uppers& upper) {
        return make_float2(minimum(maximum(low, 0.f), upper.expanded),
                           minimum(maximum(high, 0.f), upper.expanded));
    }
    MNV2_DEVICE void add(int h, int pixel, int tap, float2 expanded) {
        float2& s = sum[h][pixel];
        s.x = fmaf(expanded.x, weight[h][tap].x, s.x);
        s.y = fmaf(expanded.y, weight[h][tap].y, s.y);
    }
    MNV2_DEVICE Pair clipped_sum(int h, int pixel, const Uppers& upper) const {
        return minimum<T>(pack_relu<T>(sum[h][pixel].x, sum[h][pixel].y), upper.sum_pair);
    }
};

// Adds the pixels 2 pair and 2 pair + 1 of all patches, expanded, to the sums that use them.
template <class T, class Sizes, bool HalfSums>
MNV2_DEVICE void expand_pair(int pair, SharedAddress pixels, const uint32_t (&w_expand)[2][6],
                             const Uppers& upper, Depthwise<T, Sizes, HalfSums>& depthwise) {
    float expanded[2][4] = {};
#pragma unroll
    for (int k = 0; k < Sizes::kProducts16; k++) {
        uint32_t x[4];
        load_matrices(x, pixels + k * 32);
#pragma unroll
        for (int h = 0; h < 2; h++)
            multiply_add_k16<T>(expanded[h], x, w_expand[h][2 * k], w_expand[h][2 * k + 1]);
    }
    if constexpr (Sizes::kProducts8 > 0) {
        uint32_t x[2];
        load_matrices(x, pixels + Sizes::kProducts16 * 32);
#pragma unroll
        for (int h = 0; h < 2; h++)
            multiply_add_k8<T>(expanded[h], x[0], x[1], w_expand[h][2 * Sizes::kProducts16]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int slot = 2 * pair + i;
            const int row = slot / Sizes::kSlotCols, col = slot % Sizes::kSlotCols;
            if (col >= Sizes::kUsedSlotCols) continue;
            const auto value = depthwise.clipped(expanded[h][2 * i], expanded[h][2 * i + 1], upper);
#pragma unroll
            for (int p = 0; p < Sizes::kPixels; p++) {
                const int tap_row = row - p / Sizes::kCols * Sizes::kStride;
                const int tap_col = col - p % Sizes::kCols * Sizes::kStride;
                if (tap_row < 0 || tap_row >= 3 || tap_col < 0 || tap_col >= 3) continue;
                depthwise.add(h, p, tap_row * 3 + tap_col, value);
            }
        }
    }
}

// The operands of w_expand for both groups of 8 channels of a chunk: [h][k] are input channels 8 k
// to 8 k + 7, bias included.
template <class Sizes>
MNV2_DEVICE void load_expand(SharedAddress chunk, int lane, uint32_t (&operands)[2][6]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const SharedAddress group = chunk + h * Sizes::kExpandRows * 16;
        uint32_t first[4];
        load_matrices_transposed(first, group + lane * 16);
#pragma unroll
        for (int k = 0; k < 4; k++) operands[h][k] = first[k];
        if constexpr (Sizes::kExpandRows > 32) {
            uint32_t last[1];
            load_matrices_transposed(last, group + (32 + lane) * 16);
            operands[h][4] = last[0];
        }
    }
}

template <class T, class Sizes, bool HalfSums>
MNV2_DEVICE void project(SharedAddress chunk, int lane, const Uppers& upper,
                         const Depthwise<T, Sizes, HalfSums>& depthwise,
                         float (&sums)[Sizes::kPixels / 2][Sizes::kOutTiles][4]) {
    Pair operands[Sizes::kPixels / 2][4];
#pragma unroll
    for (int i = 0; i < Sizes::kPixels / 2; i++) {
#pragma unroll
        for (int part = 0; part < 4; part++)
            operands[i][part] = depthwise.clipped_sum(part / 2, 2 * i + part % 2, upper);
    }
#pragma unroll
    for (int j = 0; j < Sizes::kOutTiles; j += 2) {
        uint32_t w[4];
        if (j + 1 < Sizes::kOutTiles) {
            load_matrices_transposed(w, chunk + j * 256 + lane * 16);
        } else {
            uint32_t last[2];
            load_matrices_transposed(last, chunk + j * 256 + lane * 16);
            w[0] = last[0], w[1] = last[1];
        }
#pragma unroll
        for (int i = 0; i < Sizes::kPixels / 2; i++) {
            multiply_add_k16<T>(sums[i][j], operands[i], w[0], w[1]);
            if (j + 1 < Sizes::kOutTiles)
                multiply_add_k16<T>(sums[i][j + 1], operands[i], w[2], w[3]);
        }
    }
}

}  // namespace mnv2::cuda::patch
