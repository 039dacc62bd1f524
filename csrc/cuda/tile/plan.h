// Sizes of the tile kernel (tile.cu, cluster.cuh): the tile of the image, how the warps share the
// work, and what lies where in shared memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../call.h"

namespace mnv2::cuda {

constexpr int kTileSlice = 16;          // hidden channels that a warp expands and convolves
constexpr int kTileUnitPixels = 32;     // of the piece that it expands at a time
constexpr int kTileStrip = 4;           // outputs side by side of one depthwise job
constexpr int kTileRowsOfMatrices = 4;  // matrices of 16 pixels that it projects
constexpr int kTileMostColumns = 40;    // output channels that it projects to
constexpr int kTileMostWarps = 8;       // of a block of threads
constexpr int kTilePlacesHead = 16;     // bytes before the places of pixels
constexpr int kTileTapBytes = 256;      // from one tap of w_dw to the next
constexpr int kTilePixelBytes = 2 * kTileSlice;  // of an expanded pixel in a slice

// Warps of all blocks of a multiprocessor: 128 registers a thread, or 255.
constexpr int tile_most_warps(bool half_sums, int n_tiles) {
    return half_sums && n_tiles <= 3 ? 16 : 8;
}

struct TilePlan {
    // The tile: rows x cols output pixels of each of `images` whole images, or of a part of one.
    int rows, cols, images;
    int tile_rows, tile_cols;  // tiles of an image
    int in_rows, in_cols;      // of the input under a tile, with halo and padding
    int pixels, x_pixels;      // output pixels of a tile; the most pixels of x that it reads
    // A chunk of the hidden channels is cut into slices, and `parts` warps work on each.
    int chunk, chunks, slices, parts;
    // Of the projection, the warps are warps_m x warps_n, each with 4 x n_tiles matrices of 16 x 8
    // results.
    int warps_m, warps_n, n_tiles;
    int buffers;                 // of weights and of results of the depthwise
    int groups, group_channels;  // of output channels, one group a block; padded
    int cluster;                 // blocks that share the hidden channels of a tile, or 1
    int out_step;                // columns between neighbours in a depthwise job
    int strips, jobs;            // strips side by side; jobs of all rows and images
    // Pitches in bytes. They are odd multiples of 16 where ldmatrix reads.
    int x_pitch, e_row, e_slice, d_pitch, expand_pitch, project_pitch;
    int expand_rows;  // of w_expand in shared memory
    // Shared memory, in bytes from its start.
    int x, e, d, gathered, w_expand, w_project, w_dw, places, job_table, outputs, end;
    // Bytes of one of two buffers.
    int e_bytes, d_bytes, expand_bytes, project_bytes, dw_bytes;

    int warps() const { return slices * parts; }
};

// Matrices side by side of a warp's part of the projection: what there are kernels for.
inline int tile_n_tiles(int64_t out_channels, int warps_n) {
    const int64_t n = ceil_div(out_channels, warps_n * 8);
    return n <= 2 ? 2 : n == 3 ? 3 : 5;
}

// Columns between two outputs whose taps are neighbours: 2 where outputs between them read only
// pixels that they do not (stride 1, dilation 2).
inline int tile_out_step(const BlockSizes& sizes) {
    return static_cast<int>(sizes.dilation > sizes.stride ? sizes.dilation : 1);
}

// Everything that follows from the tile, the chunk and the warps.
inline TilePlan lay_out_tile(const BlockSizes& sizes, int rows, int cols, int images, int chunk,
                             int parts, int warps_m, int cluster = 1) {
    const int in = static_cast<int>(sizes.in_channels), out = static_cast<int>(sizes.out_channels);
    const int kernel_size = static_cast<int>(sizes.kernel_size),
              stride = static_cast<int>(sizes.stride);
    const int extent = static_cast<int>(sizes.dilation) * (kernel_size - 1);
    TilePlan p{};
    p.rows = rows, p.cols = cols, p.images = images;
    p.tile_rows = ceil_div(sizes.H_out, rows);
    p.tile_cols = ceil_div(sizes.W_out, cols);
    p.pixels = rows * cols * images;
    p.in_rows = (rows - 1) * stride + extent + 1;
    p.in_cols = (cols - 1) * stride + extent + 1;
    p.x_pixels = static_cast<int>(std::min<int64_t>(p.in_rows, sizes.H) *
                                  std::min<int64_t>(p.in_cols, sizes.W) * images);
    p.chunk = chunk, p.chunks = ceil_div(sizes.hidden_channels, chunk);
    p.slices = chunk / kTileSlice, p.parts = parts;
    p.cluster = cluster, p.buffers = cluster > 1 ? 1 : 2;
    p.warps_m = warps_m, p.warps_n = p.warps() / warps_m;
    p.n_tiles = cluster > 1 ? 2 : tile_n_tiles(out, p.warps_n);
    p.group_channels = p.warps_n * p.n_tiles * 8;
    p.groups = cluster > 1 ? cluster : ceil_div(out, p.group_channels);

    p.out_step = tile_out_step(sizes);
    const int strip_cols = kTileStrip * p.out_step;
    p.strips = ceil_div(cols, strip_cols) * p.out_step;
    p.jobs = images * rows * p.strips;
    // The last strip may reach past the tile. Four rows of jobs next to one another lie in
    // different banks.
    p.e_row = ((round_up(cols, strip_cols) - 1) * stride + extent + 1) * kTilePixelBytes;
    while (p.e_row * stride % 64 != 32) p.e_row += 16;
    // Behind the tile is a place for pixels that fill up the last unit.
    p.e_slice = images * p.in_rows * p.e_row + 8 * kTilePixelBytes;

    p.expand_rows = sizes.expansion ? round_up(in, 16) : 0;
    p.x_pitch = p.expand_rows * 2 + 16;
    p.d_pitch = p.expand_pitch = chunk * 2 + 16;
    p.project_pitch = round_up(p.group_channels, 16) * 2 + 16;
    p.e_bytes = p.slices * p.e_slice;
    p.d_bytes = p.pixels * p.d_pitch;
    p.expand_bytes = p.expand_rows * p.expand_pitch;
    p.project_bytes = chunk * p.project_pitch;
    p.dw_bytes = kernel_size * kernel_size * kTileTapBytes;
    int end = 0;
    const auto take = [&end](int bytes) {
        const int start = end;
        end += round_up(bytes, 16);
        return start;
    };
    p.x = take(sizes.expansion ? p.x_pixels * p.x_pitch : 0);
    p.e = take(p.e_bytes * (sizes.expansion ? 1 : p.buffers));
    p.d = take(p.d_bytes * p.buffers);
    p.gathered = take(cluster > 1 ? cluster * p.d_bytes : 0);
    p.w_expand = take(p.expand_bytes * p.buffers);
    p.w_project = take(p.project_bytes * std::max(p.buffers, cluster));
    p.w_dw = take(p.dw_bytes * p.buffers);
    p.places =
        take(sizes.expansion ? kTilePlacesHead + round_up(p.x_pixels, kTileUnitPixels) * 2 : 0);
    p.job_table = take(p.jobs * 8);
    p.outputs = take(p.pixels * 4);
    p.end = end;
    return p;
}

// Whether this kernel can run the block: whether the smallest tile fits.
inline bool tile_takes(const BlockSizes& sizes, Element element) {
    if (element == Element::single) return false;
    if (sizes.in_channels % 8 || sizes.hidden_channels % 8 || sizes.out_channels % 8) return false;
    // Places in weights are counted in 32 bits.
    if (std::max({sizes.in_channels, sizes.hidden_channels, sizes.out_channels}) > 1 << 15)
        return false;
    return lay_out_tile(sizes, 1, 1, 1, kTileSlice, 4, 4).end <= kSharedBytes;
}

}  // namespace mnv2::cuda
