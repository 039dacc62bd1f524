// Sizes of the generic kernel (generic.cu): of a tile of the image and of shared memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../call.h"

namespace mnv2::cuda {

constexpr int kGenericThreads = 256;
constexpr int kGenericChunk = 32;  // hidden channels in shared memory at a time
// A thread's part of a matrix product: pixels x channels.
constexpr int kGenericRows = 4, kGenericCols = 4;
// The expansion: 8 threads are next to one another along a chunk, 32 along the pixels.
constexpr int kGenericChunkThreads = kGenericChunk / kGenericCols;
constexpr int kGenericPixelThreads = kGenericThreads / kGenericChunkThreads;
constexpr int kGenericPass = kGenericRows * kGenericPixelThreads;  // pixels expanded at a time
// Input channels of w_expand in shared memory at a time, where x stays there and where it does not.
constexpr int kGenericKeptSlice = 64, kGenericReadSlice = 32;
// Floats from one pixel to the next: an odd number of 16 bytes, for reads without conflicts.
constexpr int kGenericDepthwisePitch = kGenericChunk + 4;
constexpr int kGenericReadPitch = kGenericReadSlice + 4;

// Of one instance: threads next to one another along the output channels, and how often their
// channels are repeated.
template <int OutThreads, int OutGroups>
struct GenericSizes {
    static constexpr int kOutThreads = OutThreads, kOutGroups = OutGroups;
    static constexpr int kGroupChannels = OutThreads * kGenericCols;
    static constexpr int kPixelThreads = kGenericThreads / OutThreads;
    static constexpr int kPixels = kPixelThreads * kGenericRows;  // of a tile, at most
    // Pixels of the depthwise that a thread computes.
    static constexpr int kDepthwiseRows = kPixels / kGenericPixelThreads;
};

using GenericNarrow = GenericSizes<8, 1>;  // up to 32 output channels
using GenericWide = GenericSizes<16, 3>;   // up to 192, and any number in several blocks of threads

struct GenericTile {
    int rows, cols;                // of the output
    int64_t tile_rows, tile_cols;  // of an image
    int halo_cols, halo_pixels;    // of the expansion under a tile
    // Whether all input channels under a tile stay in shared memory while it is computed.
    bool keeps_x;
    int slice, slices;  // input channels of w_expand in shared memory at a time, and how often
    int x_pitch;        // floats from one pixel of x to the next
    int out_blocks;     // blocks of threads that share the output channels of a tile
    int out_channels;   // of each
    // Where things begin in shared memory, bytes.
    int pixels, expanded, depthwise, x, w_expand, taps, w_project, end;
};

template <class Sizes>
constexpr GenericTile generic_tile(const BlockSizes& sizes, int rows, int cols, bool keeps_x) {
    GenericTile tile{};
    const int extent = static_cast<int>(sizes.dilation * (sizes.kernel_size - 1)) + 1;
    const int stride = static_cast<int>(sizes.stride);
    tile.rows = rows, tile.cols = cols;
    tile.tile_rows = ceil_div(sizes.H_out, rows);
    tile.tile_cols = ceil_div(sizes.W_out, cols);
    tile.halo_cols = (cols - 1) * stride + extent;
    tile.halo_pixels = ((rows - 1) * stride + extent) * tile.halo_cols;

    const int64_t channels = round_up(sizes.in_channels, 4);
    tile.keeps_x = keeps_x;
    tile.slice = keeps_x ? kGenericKeptSlice : kGenericReadSlice;
    tile.slices = static_cast<int>(ceil_div(channels, tile.slice));
    tile.x_pitch = keeps_x ? static_cast<int>(channels / 4 | 1) * 4 : kGenericReadPitch;
    const int64_t groups = ceil_div(sizes.out_channels, Sizes::kGroupChannels);
    tile.out_blocks = static_cast<int>(ceil_div(groups, Sizes::kOutGroups));
    tile.out_channels = static_cast<int>(ceil_div(groups, tile.out_blocks)) * Sizes::kGroupChannels;

    const int x_pixels = keeps_x ? tile.halo_pixels : kGenericPass;
    const int taps = static_cast<int>(sizes.kernel_size * sizes.kernel_size);
    int floats = 0;
    const auto take = [&](int count) {
        const int begin = floats * 4;
        floats += round_up(count, 4);
        return begin;
    };
    tile.pixels = take(tile.halo_pixels);
    tile.expanded = take(tile.halo_pixels * kGenericChunk);
    tile.depthwise = take(Sizes::kPixels * kGenericDepthwisePitch);
    tile.x = take(sizes.expansion ? x_pixels * tile.x_pitch : 0);
    tile.w_expand = take(sizes.expansion ? tile.slice * kGenericChunk : 0);
    tile.taps = take((taps + 2) * kGenericChunk);
    tile.w_project = take(kGenericChunk * Sizes::kGroupChannels);
    tile.end = floats * 4;
    return tile;
}

// Multiply-adds of a tile, with what is loaded for them: what its shape is chosen by.
template <class Sizes>
constexpr int64_t generic_cost(const BlockSizes& sizes, const GenericTile& tile) {
    const int64_t loads = tile.keeps_x ? 0 : sizes.in_channels / 2;
    const int64_t expansion =
        round_up(tile.halo_pixels, 64) * (sizes.expansion ? sizes.in_channels + loads + 16 : 16);
    const int64_t rest =
        Sizes::kPixels * (2 * sizes.kernel_size * sizes.kernel_size + tile.out_channels);
    return tile.tile_rows * tile.tile_cols * (expansion + rest);
}

// Every block has a tile: one pixel of the block that needs most fits.
template <class Sizes>
constexpr bool generic_fits_all() {
    BlockSizes sizes{};
    sizes.H_out = sizes.W_out = sizes.in_channels = sizes.out_channels = 1 << 20;
    sizes.kernel_size = 5, sizes.dilation = 2, sizes.stride = 2, sizes.expansion = true;
    return generic_tile<Sizes>(sizes, 1, 1, false).end <= kSharedBytes;
}
static_assert(generic_fits_all<GenericNarrow>() && generic_fits_all<GenericWide>());

// The shape of the tiles for an image, whatever the batch.
template <class Sizes>
constexpr GenericTile best_generic_tile(const BlockSizes& sizes) {
    GenericTile best{};
    int64_t best_cost = INT64_MAX;
    // Those of more channels than this overflow an int, and not one pixel of them fits.
    const bool may_keep = sizes.expansion && sizes.in_channels <= kSharedBytes / 4;
    const int most_cols = static_cast<int>(std::min<int64_t>(Sizes::kPixels, sizes.W_out));
    int64_t narrower = 0;  // tile columns of the next narrower tile
    for (int cols = 1; cols <= most_cols; cols++) {
        const int64_t tile_cols = ceil_div(sizes.W_out, cols);
        if (tile_cols == narrower) continue;
        narrower = tile_cols;
        const int64_t most_rows = std::min<int64_t>(Sizes::kPixels / cols, sizes.H_out);
        for (int64_t limit = most_rows; limit >= 1; limit /= 2) {
            // No more rows than as many tiles need.
            const int64_t tile_rows = ceil_div(sizes.H_out, limit);
            const int rows = static_cast<int>(ceil_div(sizes.H_out, tile_rows));
            GenericTile tile = generic_tile<Sizes>(sizes, rows, cols, false);
            if (tile.end > kSharedBytes) continue;
            if (may_keep) {
                const GenericTile kept = generic_tile<Sizes>(sizes, rows, cols, true);
                if (kept.end <= kSharedBytes) tile = kept;
            }
            const int64_t cost = generic_cost<Sizes>(sizes, tile);
            if (cost < best_cost) best = tile, best_cost = cost;
        }
    }
    return best;
}

}  // namespace mnv2::cuda
