// How x and the weights get into shared memory for the generic kernel: element by element, since
// nothing is known of alignment, and as floats. What a tensor does not have is zero there.
#pragma once
#include "../bias.cuh"
#include "../ptx.h"
#include "plan.h"

namespace mnv2::cuda::generic {

struct GenericCall {
    Call call;
    GenericTile tile;
    int64_t items;  // tiles of all images, times the blocks of threads that share a tile
};

// An element of x, a weight or y. T is __half, __nv_bfloat16 or float.
template <class T>
MNV2_DEVICE float load_element(const void* tensor, int64_t i) {
    return unpack<T>(static_cast<const uint16_t*>(tensor)[i]).x;
}
template <>
MNV2_DEVICE float load_element<float>(const void* tensor, int64_t i) {
    return static_cast<const float*>(tensor)[i];
}
template <class T>
MNV2_DEVICE void store_element(void* tensor, int64_t i, float value) {
    static_cast<uint16_t*>(tensor)[i] = static_cast<uint16_t>(pack<T>(value, 0.f));
}
template <>
MNV2_DEVICE void store_element<float>(void* tensor, int64_t i, float value) {
    static_cast<float*>(tensor)[i] = value;
}

MNV2_DEVICE float clip(float value, const Clip& bounds) {
    return minimum(maximum(value, bounds.lower), bounds.upper);
}

// Where a pixel of the expansion lies below and right of the tile's first one; kOutside where the
// image has no such pixel.
constexpr uint32_t kOutside = UINT32_MAX;

// The first pixel of the expansion under a tile.
struct Position {
    int64_t image, row, col;
};

// What every step of a tile needs to know.
struct TileContext {
    SharedAddress shared;
    Position position;
};

MNV2_DEVICE void stage_pixel_table(const Call& call, const GenericTile& tile, const Position& at,
                                   SharedAddress table) {
#pragma unroll 1
    for (int pixel = thread_index(); pixel < tile.halo_pixels; pixel += kGenericThreads) {
        const int down = pixel / tile.halo_cols, right = pixel % tile.halo_cols;
        const int64_t row = at.row + down, col = at.col + right;
        const bool inside = row >= 0 && row < call.H && col >= 0 && col < call.W;
        const uint32_t place = static_cast<uint32_t>(down) << 16 | static_cast<uint32_t>(right);
        store_shared<uint32_t>(table + pixel * 4, inside ? place : kOutside);
    }
}

// Channels first_channel to first_channel + channels - 1 of `pixels` pixels of x, `pitch` floats
// apart. A warp takes a pixel at a time; four of them are under way together.
template <class T>
MNV2_DEVICE void stage_pixels(const Call& call, const Position& at, SharedAddress table,
                              int first_pixel, int pixels, int64_t first_channel, int channels,
                              SharedAddress to, int pitch) {
    constexpr int kWarps = kGenericThreads / 32, kTogether = 4;
    const int warp = thread_index() / 32, lane = thread_index() % 32;
#pragma unroll 1
    for (int p = warp; p < pixels; p += kWarps * kTogether) {
        int64_t from[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            const int pixel = p + i * kWarps;
            const uint32_t place = pixel < pixels
                                       ? load_shared<uint32_t>(table + (first_pixel + pixel) * 4)
                                       : kOutside;
            const int64_t row = at.row + (place >> 16), col = at.col + (place & 0xffff);
            from[i] = place == kOutside
                          ? -1
                          : ((at.image * call.H + row) * call.W + col) * call.in_channels;
        }
#pragma unroll 1
        for (int c = lane; c < channels; c += 32) {
            const int64_t channel = first_channel + c;
            float values[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; i++)
                values[i] = from[i] >= 0 && channel < call.in_channels
                                ? load_element<T>(call.x, from[i] + channel)
                                : 0.f;
#pragma unroll
            for (int i = 0; i < kTogether; i++)
                if (p + i * kWarps < pixels)
                    store_shared<float>(to + ((p + i * kWarps) * pitch + c) * 4, values[i]);
        }
    }
}

// Rows first_row to first_row + rows - 1 and columns first_col to first_col + Cols - 1 of a weight.
template <class T, int Cols>
MNV2_DEVICE void stage_weight(const void* weight, int64_t first_row, int rows, int64_t all_rows,
                              int64_t first_col, int64_t all_cols, SharedAddress to) {
    constexpr int kTogether = 4;
    const int col = thread_index() % Cols;
    const bool has_col = first_col + col < all_cols;
    constexpr int kStep = kGenericThreads / Cols;
#pragma unroll 1
    for (int r = thread_index() / Cols; r < rows; r += kStep * kTogether) {
        float values[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            const int64_t row = first_row + r + i * kStep;
            values[i] = has_col && r + i * kStep < rows && row < all_rows
                            ? load_element<T>(weight, row * all_cols + first_col + col)
                            : 0.f;
        }
#pragma unroll
        for (int i = 0; i < kTogether; i++)
            if (r + i * kStep < rows)
                store_shared<float>(to + ((r + i * kStep) * Cols + col) * 4, values[i]);
    }
}

// Taps and, after them, the biases of the depthwise and of the expansion, for one chunk.
template <class T>
MNV2_DEVICE void stage_taps(const Call& call, int64_t hidden, SharedAddress to) {
    const int taps = static_cast<int>(call.kernel_size * call.kernel_size);
    stage_weight<T, kGenericChunk>(call.w_dw, 0, taps, taps, hidden, call.hidden_channels, to);
    if (thread_index() < 2 * kGenericChunk) {
        const int channel = thread_index() % kGenericChunk;
        const float* bias = thread_index() < kGenericChunk ? call.b_dw : call.b_expand;
        store_shared<float>(to + (taps * kGenericChunk + thread_index()) * 4,
                            bias_or_zero(bias, hidden + channel, call.hidden_channels));
    }
}

}  // namespace mnv2::cuda::generic
