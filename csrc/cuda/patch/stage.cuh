// How weights and x get into shared memory for the patch kernel.
#pragma once
#include "../bias.cuh"
#include "../call.h"
#include "../ptx.h"
#include "plan.h"

namespace mnv2::cuda::patch {

// A chunk has two groups of 8 hidden channels. Where the last one has but one, that one counts
// twice, each time with half of the weights of the projection: zeros in the place of the other
// would make NaN of an infinity in x.
MNV2_DEVICE bool counts_twice(int hidden_channels, int channel) {
    return hidden_channels % kPatchChunk != 0 && channel >= hidden_channels - 8;
}
MNV2_DEVICE int existing(int hidden_channels, int channel) {
    return channel < hidden_channels ? channel : channel - 8;
}

// The hidden channel in one of the places of the products. Without an expansion a lane has four
// channels next to one another, which are one load.
template <class Sizes>
MNV2_DEVICE int channel_of(int place) {
    if (Sizes::kExpands) return place;
    return place / kPatchChunk * kPatchChunk + place % 8 / 2 * 4 + place / 8 % 2 * 2 + place % 2;
}

template <class T>
MNV2_DEVICE Pair half_of(Pair pair) {
    const float2 values = unpack<T>(pair);
    return pack<T>(values.x / 2, values.y / 2);
}

// w_expand by groups of 8 hidden channels, and in them by input channel.
template <class Sizes>
MNV2_DEVICE void stage_expand(const Call& call, const PatchWeights& weights, SharedAddress to) {
    const auto* w_expand = static_cast<const uint16_t*>(call.w_expand);
    const int hidden = static_cast<int>(call.hidden_channels);
    const int rows = weights.chunks * kPatchChunk / 8 * Sizes::kIn;
    for (int i = thread_index(); i < rows; i += kPatchThreads) {
        const int row = i % Sizes::kIn, channel = existing(hidden, i / Sizes::kIn * 8);
        const bool there = row < call.in_channels;
        copy_async(to + i * 16, w_expand + (there ? row * hidden + channel : 0), there ? 16 : 0);
    }
}

// What the lanes need of the chunks, four lanes a chunk: taps and biases of the channels that they
// own.
template <class T, class Sizes>
MNV2_DEVICE void stage_lanes(const Call& call, const PatchWeights& weights, SharedAddress to) {
    const int hidden = static_cast<int>(call.hidden_channels);
    for (int i = thread_index(); i < weights.chunks * 4; i += kPatchThreads) {
        Pair taps[10][2];
        float2 dw[2], expand[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int place = i / 4 * kPatchChunk + h * 8 + i % 4 * 2;
            const int channel = existing(hidden, channel_of<Sizes>(place));
            const auto* w_dw = static_cast<const uint16_t*>(call.w_dw) + channel;
#pragma unroll
            for (int tap = 0; tap < 9; tap++)
                taps[tap][h] = *reinterpret_cast<const Pair*>(w_dw + tap * hidden);
            const auto pair_of = [&](const float* bias) {
                return make_float2(bias_or_zero(bias, channel, hidden),
                                   bias_or_zero(bias, channel + 1, hidden));
            };
            dw[h] = pair_of(call.b_dw), expand[h] = pair_of(call.b_expand);
            taps[9][h] = pack<T>(dw[h].x, dw[h].y);
        }
        const SharedAddress lane = to + i * Sizes::kLaneBytes;
        if constexpr (Sizes::kHalfSums) {
#pragma unroll
            for (int tap = 0; tap < 10; tap += 2)
                store_shared(
                    lane + tap * Sizes::kTapBytes,
                    make_uint4(taps[tap][0], taps[tap][1], taps[tap + 1][0], taps[tap + 1][1]));
        } else {
#pragma unroll
            for (int tap = 0; tap < 9; tap++) {
                const float2 first = unpack<T>(taps[tap][0]), second = unpack<T>(taps[tap][1]);
                store_shared(lane + tap * Sizes::kTapBytes,
                             make_float4(first.x, first.y, second.x, second.y));
            }
            store_shared(lane + 9 * Sizes::kTapBytes,
                         make_float4(dw[0].x, dw[0].y, dw[1].x, dw[1].y));
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
            store_shared(lane + Sizes::kExpandBias + h * 16,
                         make_float4(expand[h].x, expand[h].y, expand[h].x, expand[h].y));
    }
}

// w_project by chunks, in them by groups of 8 output channels, and in those by place.
template <class T, class Sizes>
MNV2_DEVICE void stage_project(const Call& call, const PatchWeights& weights, SharedAddress to) {
    const auto* w_project = static_cast<const uint16_t*>(call.w_project);
    const int hidden = static_cast<int>(call.hidden_channels);
    const int channels = static_cast<int>(call.out_channels);
    const int rows = weights.chunks * kPatchChunk;
    for (int i = thread_index(); i < rows * Sizes::kOutTiles; i += kPatchThreads) {
        const int row = i / Sizes::kOutTiles, group = i % Sizes::kOutTiles;
        const bool there = group * 8 < channels;
        const int channel = channel_of<Sizes>(row);
        const auto* from =
            w_project + (there ? existing(hidden, channel) * channels + group * 8 : 0);
        const int block = row / kPatchChunk * Sizes::kOutTiles + group;
        const SharedAddress address = to + (block * kPatchChunk + row % kPatchChunk) * 16;
        if (there && counts_twice(hidden, channel)) {
            const auto* pairs = reinterpret_cast<const Pair*>(from);
            store_shared(address, make_uint4(half_of<T>(pairs[0]), half_of<T>(pairs[1]),
                                             half_of<T>(pairs[2]), half_of<T>(pairs[3])));
        } else {
            copy_async(address, from, there ? 16 : 0);
        }
    }
}

// The bias of the outputs.
template <class Sizes>
MNV2_DEVICE void stage_bias(const Call& call, SharedAddress to) {
    if (const int channel = thread_index(); channel < Sizes::kOut)
        store_shared(to + channel * 4, bias_or_zero(call.b_project, channel, call.out_channels));
}

// The first output pixel of a tile.
struct Position {
    int image, row, col;
};

template <class Sizes>
MNV2_DEVICE Position position(const PatchTile& tile, int number) {
    const int in_image = number % (tile.tile_cols * tile.tile_rows);
    return {number / (tile.tile_cols * tile.tile_rows),
            in_image / tile.tile_cols * tile.patch_rows * Sizes::kRows,
            in_image % tile.tile_cols * tile.patch_cols * Sizes::kCols};
}

// Bytes from the first pixel of x under a patch to another one, counted from that patch.
template <class Sizes>
MNV2_DEVICE int tile_offset(const PatchTile& tile, unsigned row, int col) {
    return 2 * (row / Sizes::kStepRows * tile.patch_row_pitch +
                row % Sizes::kStepRows * tile.row_pitch + Sizes::slot_col(col));
}

// Where the pixels under a patch begin.
template <class Sizes>
MNV2_DEVICE SharedAddress patch_address(const PatchTile& tile, int patch, SharedAddress x) {
    return x + 2 * (patch / tile.patch_cols * tile.patch_row_pitch +
                    patch % tile.patch_cols * Sizes::kPatchPitch);
}

// The pixels of x under a tile, zeros outside the image. A warp takes a row, and its lanes pixels
// next to one another; addresses outside the image are not read.
template <class Sizes>
MNV2_DEVICE void stage_x(const Call& call, const PatchTile& tile, const Position& at,
                         SharedAddress to) {
    constexpr int pixels = kWarp / Sizes::kInOctets / Sizes::kStepCols * Sizes::kStepCols;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int octet = lane % Sizes::kInOctets, first = lane / Sizes::kInOctets;
    if (first >= pixels) return;
    const int channels = static_cast<int>(call.in_channels);
    const unsigned width = octet * 8 < channels ? static_cast<unsigned>(call.W) : 0;
    const int first_row = at.row * Sizes::kStride - static_cast<int>(call.pad_top);
    const int first_col = at.col * Sizes::kStride - static_cast<int>(call.pad_left);
    const int64_t row_elements = call.W * channels;
    const auto* from_row = static_cast<const uint16_t*>(call.x) + octet * 8 +
                           (at.image * call.H + first_row + warp) * row_elements +
                           (first_col + first) * channels;
    to += 2 * Sizes::slot_col(first) + octet * 16;
    const unsigned height = static_cast<unsigned>(call.H);
    for (int row = warp; row < tile.rows; row += kPatchWarps) {
        const unsigned columns = static_cast<unsigned>(first_row + row) < height ? width : 0;
        const auto* from = from_row;
        SharedAddress address = to + tile_offset<Sizes>(tile, static_cast<unsigned>(row), 0);
#pragma unroll 2
        for (int col = first; col < tile.cols; col += pixels) {
            copy_async(address, from, static_cast<unsigned>(first_col + col) < columns ? 16 : 0);
            address += 2 * Sizes::slot_col(pixels), from += pixels * channels;
        }
        from_row += kPatchWarps * row_elements;
    }
}

}  // namespace mnv2::cuda::patch
