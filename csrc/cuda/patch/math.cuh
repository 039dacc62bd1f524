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

// Where a lane finds the weights of a chunk.
struct ChunkAddresses {
    SharedAddress expand, expand_last, of_lane, project;

    template <class Sizes>
    MNV2_DEVICE void start(const PatchWeights& weights, SharedAddress shared, unsigned lane) {
        expand = shared + weights.expand + lane / 16 * Sizes::kIn * 16 + lane % 16 * 16;
        // Of the last 8 input channels of an odd number of them, for ldmatrix of both groups.
        expand_last = shared + weights.expand + lane / 8 % 2 * Sizes::kIn * 16 + lane % 8 * 16 +
                      (Sizes::kIn - 8) * 16;
        of_lane = shared + weights.of_lanes + lane % 4 * Sizes::kLaneBytes;
        project = shared + weights.project + lane * 16;
    }
    template <class Sizes>
    MNV2_DEVICE void advance() {
        expand += kPatchChunk * Sizes::kIn * 2, expand_last += kPatchChunk * Sizes::kIn * 2;
        of_lane += 4 * Sizes::kLaneBytes;
        project += kPatchChunk * Sizes::kOut * 2;
    }
};

// The depthwise sums of a lane: two channels of every pixel of its patch, for each of the two
// groups of 8 channels in a chunk; in fp16, or in float.
template <class T, class Sizes, bool HalfSums = Sizes::kHalfSums>
struct Depthwise;

template <class T, class Sizes>
struct Depthwise<T, Sizes, true> {
    using Upper = Pair;
    Pair weight[2][10], sum[2][Sizes::kPixels];

    MNV2_DEVICE static Upper expanded_upper(const Uppers& upper) { return upper.expanded_pair; }

    MNV2_DEVICE void start(const ChunkAddresses& chunk) {
#pragma unroll
        for (int tap = 0; tap < 10; tap += 2) {
            const auto taps = load_shared<uint4>(chunk.of_lane + tap * Sizes::kTapBytes);
            weight[0][tap] = taps.x, weight[1][tap] = taps.y;
            weight[0][tap + 1] = taps.z, weight[1][tap + 1] = taps.w;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int p = 0; p < Sizes::kPixels; p++) sum[h][p] = weight[h][9];
        }
    }

    MNV2_DEVICE static Pair clipped(float low, float high, Upper upper) {
        return minimum<T>(pack_relu<T>(low, high), upper);
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
    using Upper = float;
    float2 weight[2][10], sum[2][Sizes::kPixels];

    MNV2_DEVICE static Upper expanded_upper(const Uppers& upper) { return upper.expanded; }

    MNV2_DEVICE void start(const ChunkAddresses& chunk) {
#pragma unroll
        for (int tap = 0; tap < 10; tap++) {
            const auto of_tap = load_shared<float4>(chunk.of_lane + tap * Sizes::kTapBytes);
            weight[0][tap] = make_float2(of_tap.x, of_tap.y);
            weight[1][tap] = make_float2(of_tap.z, of_tap.w);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int p = 0; p < Sizes::kPixels; p++) sum[h][p] = weight[h][9];
        }
    }

    MNV2_DEVICE static float2 clipped(float low, float high, Upper upper) {
        return make_float2(minimum(maximum(low, 0.f), upper), minimum(maximum(high, 0.f), upper));
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

// Upper bounds of the expanded values that a patch uses: 0 outside the image, where they are 0.
template <class Sizes, class Upper>
struct Inside {
    Upper upper[Sizes::kUsedSlotCols];
    bool row[Sizes::kSlotRows];

    MNV2_DEVICE void start(const Call& call, int first_row, int first_col, Upper expanded) {
#pragma unroll
        for (int c = 0; c < Sizes::kUsedSlotCols; c++)
            upper[c] = static_cast<unsigned>(first_col + c) < call.W ? expanded : Upper{0};
#pragma unroll
        for (int r = 0; r < Sizes::kSlotRows; r++)
            row[r] = static_cast<unsigned>(first_row + r) < call.H;
    }
    MNV2_DEVICE Upper upper_of(int r, int c) const { return row[r] ? upper[c] : Upper{0}; }
};

template <class T, class Sizes>
using InsideOf = Inside<Sizes, typename Depthwise<T, Sizes>::Upper>;

// w_expand and its bias for both groups of 8 channels of a chunk.
template <class Sizes>
struct Expansion {
    uint32_t w[Sizes::kInOctets / 2 + 1][4];  // groups, and in them two times 8 input channels
    float4 bias[2];                           // of both pixels of a pair

    MNV2_DEVICE void start(const ChunkAddresses& chunk) {
#pragma unroll
        for (int k = 0; k < Sizes::kInOctets / 2; k++)
            load_matrices_transposed(w[k], chunk.expand + k * 256);
        if constexpr (Sizes::kInOctets % 2 != 0) {
            constexpr int k = Sizes::kInOctets / 2;
            uint32_t last[2];
            load_matrices_transposed(last, chunk.expand_last);
            w[k][0] = last[0], w[k][1] = last[1];
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
            bias[h] = load_shared<float4>(chunk.of_lane + Sizes::kExpandBias + h * 16);
    }
};

// Adds two channels of a pixel to the sums that use it.
template <class T, class Sizes, class Value>
MNV2_DEVICE void add_slot(int row, int col, int h, Value value, Depthwise<T, Sizes>& depthwise) {
#pragma unroll
    for (int p = 0; p < Sizes::kPixels; p++) {
        const int tap_row = row - p / Sizes::kCols * Sizes::kStride;
        const int tap_col = col - p % Sizes::kCols * Sizes::kStride;
        if (tap_row < 0 || tap_row >= 3 || tap_col < 0 || tap_col >= 3) continue;
        depthwise.add(h, p, tap_row * 3 + tap_col, value);
    }
}

// Without an expansion: adds a row of pixels of x.
template <class T, class Sizes>
MNV2_DEVICE void add_row(int row, SharedAddress pixels, Depthwise<T, Sizes>& depthwise) {
#pragma unroll
    for (int col = 0; col < Sizes::kUsedSlotCols; col++) {
        const auto channels = load_shared<uint2>(pixels + 2 * Sizes::slot_col(col));
        add_slot(row, col, 0, unpack<T>(channels.x), depthwise);
        add_slot(row, col, 1, unpack<T>(channels.y), depthwise);
    }
}

// Adds the pixels 2 pair and 2 pair + 1 of all patches, expanded, to the sums that use them.
template <class T, class Sizes>
MNV2_DEVICE void expand_pair(int pair, SharedAddress pixels, const Expansion<Sizes>& expansion,
                             const InsideOf<T, Sizes>& inside, Depthwise<T, Sizes>& depthwise) {
    const float4(&bias)[2] = expansion.bias;
    float expanded[2][4] = {{bias[0].x, bias[0].y, bias[0].z, bias[0].w},
                            {bias[1].x, bias[1].y, bias[1].z, bias[1].w}};
#pragma unroll
    for (int k = 0; k < Sizes::kInOctets / 2; k++) {
        uint32_t x[4];
        load_matrices(x, pixels + k * 32);
#pragma unroll
        for (int h = 0; h < 2; h++)
            multiply_add_k16<T>(expanded[h], x, expansion.w[k][2 * h], expansion.w[k][2 * h + 1]);
    }
    if constexpr (Sizes::kInOctets % 2 != 0) {
        uint32_t x[2];
        load_matrices(x, pixels + (Sizes::kInOctets - 1) * 16);
#pragma unroll
        for (int h = 0; h < 2; h++)
            multiply_add_k8<T>(expanded[h], x[0], x[1], expansion.w[Sizes::kInOctets / 2][h]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int slot = 2 * pair + i;
        const int row = slot / Sizes::kSlotCols, col = slot % Sizes::kSlotCols;
        if (col >= Sizes::kUsedSlotCols) continue;
        const auto upper = inside.upper_of(row, col);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            add_slot(row, col, h,
                     depthwise.clipped(expanded[h][2 * i], expanded[h][2 * i + 1], upper),
                     depthwise);
        }
    }
}

template <class T, class Sizes>
MNV2_DEVICE void project(const ChunkAddresses& chunk, const Uppers& upper,
                         const Depthwise<T, Sizes>& depthwise,
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
            load_matrices_transposed(w, chunk.project + j * 256);
        } else {
            uint32_t last[2];
            load_matrices_transposed(last, chunk.project + j * 256);
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
