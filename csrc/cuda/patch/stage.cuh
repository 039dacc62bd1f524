// How weights and x get into shared memory for the patch kernel.
#pragma once
#include "../bias.cuh"
#include "../call.h"
#include "../ptx.h"
#include "plan.h"

namespace mnv2::cuda::patch {

template <class T>
struct Constants;
template <>
struct Constants<__half> {
    static constexpr Pair kOnes = 0x3c003c00;
    static constexpr float kLargest = 65504.f;
};
template <>
struct Constants<__nv_bfloat16> {
    static constexpr Pair kOnes = 0x3f803f80;
    static constexpr float kLargest = 3.3895314e38f;
};

template <class T>
MNV2_DEVICE float nearest_finite(float value) {
    constexpr float largest = Constants<T>::kLargest;
    return maximum(minimum(value, largest), -largest);
}

// A float as the sum of two numbers of T: the bias keeps its precision in the product. Both are
// finite where it is, since 0 times them has to be 0.
template <class T>
MNV2_DEVICE float2 split(float value) {
    const float coarse = nearest_finite<T>(value);
    const float fine = value - unpack<T>(pack<T>(coarse, 0.f)).x;
    return make_float2(coarse, fabsf(fine) == INFINITY ? fine : nearest_finite<T>(fine));
}

// A chunk has two groups of 8 hidden channels. Where the last one has but one, that one counts
// twice, each time with half of the weights of the projection: zeros in the place of the other
// would make NaN of an infinity in x.
MNV2_DEVICE bool counts_twice(const Call& call, int64_t channel) {
    return call.hidden_channels % kPatchChunk != 0 && channel >= call.hidden_channels - 8;
}
MNV2_DEVICE int64_t existing(const Call& call, int64_t channel) {
    return channel < call.hidden_channels ? channel : channel - 8;
}

template <class T>
MNV2_DEVICE Pair half_of(Pair pair) {
    const float2 values = unpack<T>(pair);
    return pack<T>(values.x / 2, values.y / 2);
}

// w_expand by groups of 8 hidden channels, and in them by input channel; after the input channels
// the two rows of the bias, and zeros.
template <class T, class Sizes>
MNV2_DEVICE void stage_expand(const Call& call, const PatchWeights& weights, SharedAddress to) {
    const auto* w_expand = static_cast<const uint16_t*>(call.w_expand);
    const int groups = weights.chunks * kPatchChunk / 8;
    for (int i = thread_index(); i < groups * Sizes::kExpandRows; i += kPatchThreads) {
        const int row = i % Sizes::kExpandRows;
        const int64_t channel = existing(call, i / Sizes::kExpandRows * 8);
        const SharedAddress address = to + i * 16;
        if (row < Sizes::kIn) {
            const bool there = row < call.in_channels;
            const int64_t from = there ? row * call.hidden_channels + channel : 0;
            copy_async(address, w_expand + from, there ? 16 : 0);
            continue;
        }
        Pair coarse[4] = {}, fine[4] = {};
        if (row < Sizes::kIn + 2) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int64_t at = channel + 2 * c;
                const float2 low = split<T>(bias_or_zero(call.b_expand, at, call.hidden_channels));
                const float2 high =
                    split<T>(bias_or_zero(call.b_expand, at + 1, call.hidden_channels));
                coarse[c] = pack<T>(low.x, high.x);
                fine[c] = pack<T>(low.y, high.y);
            }
        }
        store_shared(address, row == Sizes::kIn
                                  ? make_uint4(coarse[0], coarse[1], coarse[2], coarse[3])
                                  : make_uint4(fine[0], fine[1], fine[2], fine[3]));
    }
}

// A chunk's nine taps and its bias, 16 channels each.
template <class T, bool HalfSums>
MNV2_DEVICE void stage_depthwise(const Call& call, const PatchWeights& weights, SharedAddress to) {
    const auto* w_dw = static_cast<const uint16_t*>(call.w_dw);
    const int groups = weights.chunks * kPatchChunk / 8;
    for (int i = thread_index(); i < groups * 10; i += kPatchThreads) {
        const int group = i / 10, tap = i % 10;
        const int64_t channel = existing(call, group * 8);
        const SharedAddress chunk = to + group / 2 * weights.dw_chunk;
        if (tap < 9) {
            copy_async(chunk + tap * 32 + group % 2 * 16,
                       w_dw + tap * call.hidden_channels + channel);
            continue;
        }
        float bias[8];
#pragma unroll
        for (int c = 0; c < 8; c++)
            bias[c] = bias_or_zero(call.b_dw, channel + c, call.hidden_channels);
        if constexpr (HalfSums) {
            store_shared(chunk + 9 * 32 + group % 2 * 16,
                         make_uint4(pack<T>(bias[0], bias[1]), pack<T>(bias[2], bias[3]),
                                    pack<T>(bias[4], bias[5]), pack<T>(bias[6], bias[7])));
        } else {
#pragma unroll
            for (int c = 0; c < 8; c += 2)
                store_shared(chunk + 9 * 32 + group % 2 * 32 + c * 4,
                             make_float2(bias[c], bias[c + 1]));
        }
    }
}

// w_project by chunks, in them by groups of 8 output channels, and in those by hidden channel.
template <class T, class Sizes>
MNV2_DEVICE void stage_project(const Call& call, const PatchWeights& weights, SharedAddress to) {
    const auto* w_project = static_cast<const uint16_t*>(call.w_project);
    const int rows = weights.chunks * kPatchChunk;
    for (int i = thread_index(); i < rows * Sizes::kOutTiles; i += kPatchThreads) {
        const int row = i / Sizes::kOutTiles, group = i % Sizes::kOutTiles;
        const bool there = group * 8 < call.out_channels;
        const int64_t from = there ? existing(call, row) * call.out_channels + group * 8 : 0;
        const int block = row / kPatchChunk * Sizes::kOutTiles + group;
        const SharedAddress address = to + (block * kPatchChunk + row % kPatchChunk) * 16;
        if (there && counts_twice(call, row)) {
            const auto* pairs = reinterpret_cast<const Pair*>(w_project + from);
            store_shared(address, make_uint4(half_of<T>(pairs[0]), half_of<T>(pairs[1]),
                                             half_of<T>(pairs[2]), half_of<T>(pairs[3])));
        } else {
            copy_async(address, w_project + from, there ? 16 : 0);
        }
    }
}

// The first output pixel of a tile.
struct Position {
    int64_t image;
    int row, col;
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
MNV2_DEVICE int tile_offset(const PatchTile& tile, int row, int col) {
    return 2 * (row / Sizes::kStepRows * tile.patch_row_pitch +
                row % Sizes::kStepRows * tile.row_pitch + Sizes::slot_col(col));
}

// Where the pixels under a patch begin.
template <class Sizes>
MNV2_DEVICE SharedAddress patch_address(const PatchTile& tile, int patch, SharedAddress x) {
    return x + 2 * (patch / tile.patch_cols * tile.patch_row_pitch +
                    patch % tile.patch_cols * Sizes::kPatchPitch);
}

// The pixels of x under a tile, zeros outside the image, and the channels of the bias.
template <class T, class Sizes>
MNV2_DEVICE void stage_x(const Call& call, const PatchTile& tile, const Position& at,
                         SharedAddress to) {
    const auto* x =
        static_cast<const uint16_t*>(call.x) + at.image * call.H * call.W * call.in_channels;
    const int first_row = at.row * Sizes::kStride - static_cast<int>(call.pad_top);
    const int first_col = at.col * Sizes::kStride - static_cast<int>(call.pad_left);
    constexpr int octets = Sizes::kPixelPitch / 8;
    for (int i = thread_index(); i < tile.rows * tile.cols * octets; i += kPatchThreads) {
        const int octet = i % octets, pixel = i / octets;
        const int row = pixel / tile.cols, col = pixel % tile.cols;
        const int x_row = first_row + row, x_col = first_col + col;
        const bool inside = x_row >= 0 && x_row < call.H && x_col >= 0 && x_col < call.W;
        const SharedAddress address = to + tile_offset<Sizes>(tile, row, col) + octet * 16;
        if (octet == octets - 1) {
            store_shared(address, make_uint4(inside ? Constants<T>::kOnes : 0u, 0u, 0u, 0u));
        } else {
            const bool there = inside && octet * 8 < call.in_channels;
            const int64_t pixel_of_x = there ? x_row * call.W + x_col : 0;
            copy_async(address, x + pixel_of_x * call.in_channels + (there ? octet * 8 : 0),
                       there ? 16 : 0);
        }
    }
}

}  // namespace mnv2::cuda::patch
