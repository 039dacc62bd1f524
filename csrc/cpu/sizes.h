// Arithmetic of sizes, written once for the kernels and for what calls them. No torch.
#pragma once
#include <cstdint>

#include "../block.h"

namespace mnv2::cpu {

// Floats in whole cache lines of 64 bytes: the piece after this one is aligned like it.
constexpr int64_t aligned(int64_t floats) { return round_up(floats, 16); }
constexpr int64_t aligned_floats(int64_t bytes) { return aligned(ceil_div(bytes, 4)); }

// Rows (and columns) from the first tap of the depthwise window to the last.
constexpr int64_t extent(const BlockSizes& sizes) {
    return sizes.dilation * (sizes.kernel_size - 1);
}

// Weights of the depthwise that a hidden channel has.
constexpr int64_t taps_of_channel(const BlockSizes& sizes) {
    return sizes.dense ? 0 : sizes.kernel_size * sizes.kernel_size;
}

// Weights of a hidden channel before the projection.
constexpr int64_t weights_of_channel(const BlockSizes& sizes) {
    if (sizes.dense) return sizes.kernel_size * sizes.kernel_size * sizes.in_channels;
    return sizes.expansion ? sizes.in_channels : 0;
}

// Input rows that `rows` output rows read, padding included.
constexpr int64_t window_rows(const BlockSizes& sizes, int64_t rows) {
    return (rows - 1) * sizes.stride + extent(sizes) + 1;
}

// The same of columns.
constexpr int64_t window_cols(const BlockSizes& sizes, int64_t cols) {
    return window_rows(sizes, cols);
}

// The first of the rows, negative where it is padding.
constexpr int64_t first_input_row(const BlockSizes& sizes, int64_t out_row) {
    return out_row * sizes.stride - sizes.pad_top;
}

// Bytes of a row of x, and of y.
constexpr int64_t x_row_bytes(const BlockArgs& args) {
    return size_of(args.element) * args.W * args.in_channels;
}
constexpr int64_t y_row_bytes(const BlockArgs& args) {
    return size_of(args.element) * args.W_out * args.out_channels;
}

// Numbers of one image of y.
constexpr int64_t y_numbers(const BlockSizes& sizes) {
    return sizes.H_out * sizes.W_out * sizes.out_channels;
}

}  // namespace mnv2::cpu
