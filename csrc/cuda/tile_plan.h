// Sizes of the tile kernel (tile.cu): the tile of the image, how the warps share its matrices, and
// what lies where in shared memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "call.h"

namespace mnv2::cuda {

constexpr int kTileRowsOfMatrices = 4;       // tiles of 16 pixels that a warp projects
constexpr int kTileMaxWarps = 16;            // of a block, kernel 3; kernel 5 needs more registers
constexpr int kTileStrip = 2;                // output pixels side by side of one depthwise job
constexpr int kTileQuad = 4;                 // channels of one depthwise job
constexpr int kTileSharedBytes = 163 << 10;  // of a block on every GPU of capability 8.0 and 9.0

constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TilePlan {
    // The tile: rows x cols output pixels of each of `images` whole images, or of a part of one.
    int rows, cols, images;
    int tile_rows, tile_cols;  // tiles of an image
    int in_rows, in_cols;      // of the input under a tile, with halo and padding
    int pixels;                // output pixels of a tile
    // Warps: warps_m x warps_n, each with 4 x n_tiles matrices of 16 x 8 results.
    int warps_m, warps_n, n_tiles;
    int groups, group_channels;  // of output channels, one group a block; padded
    int chunk;                   // hidden channels at a time
    int buffers;                 // of the weights of a chunk
    // Depthwise jobs: strips of two columns by `job_rows` rows.
    int in_step, out_step;  // pixels between neighbours in a job, in and out
    int jobs, job_rows;
    // Pitches, in elements of 2 bytes: odd multiples of 16 bytes where ldmatrix reads.
    int x_pitch, e_pitch, d_pitch, expand_pitch, project_pitch;
    int expand_rows;  // of w_expand in shared memory
    // Shared memory, in bytes from its start.
    int x, e, d, w_expand, w_project, w_dw, biases, places, job_table, end;
    int expand_bytes, project_bytes, dw_bytes, bias_bytes;  // of one buffer

    int threads() const { return warps_m * warps_n * 32; }
};

// Sums of the depthwise in fp16: where the layers' own results are fp16 and no sum can overflow.
inline bool tile_half_sums(const BlockSizes& sizes, Element element) {
    return element == Element::half && sizes.kernel == 3 && sizes.expansion &&
           sizes.clip_expand.lower >= -64.f && sizes.clip_expand.upper <= 64.f;
}

// Columns and rows between two outputs whose taps are neighbours: 2 where outputs between them read
// only pixels that they do not (stride 1, dilation 2).
inline int tile_out_step(const BlockSizes& sizes) {
    return static_cast<int>(sizes.dilation > sizes.stride ? sizes.dilation : 1);
}

// 1 where neighbours in a strip read pixels that are neighbours among those that the taps read.
inline int tile_job_stride(const BlockSizes& sizes) {
    return sizes.stride > sizes.dilation ? 2 : 1;
}

// Everything that follows from the tile, the warps and the chunk.
inline TilePlan lay_out_tile(const BlockSizes& sizes, int rows, int cols, int images, int warps_m,
                             int warps_n, int n_tiles, int chunk, int buffers) {
    const int in = static_cast<int>(sizes.in_channels), out = static_cast<int>(sizes.out_channels);
    const int kernel = static_cast<int>(sizes.kernel), stride = static_cast<int>(sizes.stride);
    const int extent = static_cast<int>(sizes.dilation) * (kernel - 1);
    TilePlan p{};
    p.rows = rows, p.cols = cols, p.images = images;
    p.tile_rows = static_cast<int>(ceil_div(sizes.H_out, rows));
    p.tile_cols = static_cast<int>(ceil_div(sizes.W_out, cols));
    p.pixels = rows * cols * images;
    p.warps_m = warps_m, p.warps_n = warps_n, p.n_tiles = n_tiles;
    p.group_channels = warps_n * n_tiles * 8;
    p.groups = static_cast<int>(ceil_div(out, p.group_channels));
    p.chunk = chunk, p.buffers = buffers;

    p.out_step = tile_out_step(sizes);
    p.in_step = static_cast<int>(sizes.dilation);
    // The last strip may reach past the tile.
    p.in_cols = (round_up(cols, kTileStrip * p.out_step) - 1) * stride + extent + 1;
    p.in_rows = (rows - 1) * stride + extent + 1;
    const int strips = round_up(cols, kTileStrip * p.out_step) / kTileStrip;
    const int lanes = p.threads() / (chunk / kTileQuad),
              ring = (kernel - 1) / tile_job_stride(sizes);
    int best_cost = 0;
    for (int job_rows = 1; job_rows <= rows; job_rows++) {
        const int segments = round_up(rows, job_rows * p.out_step) / job_rows;
        const int jobs = strips * segments * images;
        const int cost = static_cast<int>(ceil_div(jobs, lanes)) * (job_rows + ring);
        if (best_cost == 0 || cost < best_cost)
            best_cost = cost, p.job_rows = job_rows, p.jobs = jobs;
    }

    p.x_pitch = round_up(in, 16) + 8;
    p.expand_rows = round_up(in, 16);
    // 8 lanes read one pixel of a strip and 8 the same pixel of the next strip.
    p.e_pitch = chunk == 64 ? 72 : stride * p.out_step == 1 ? 48 : 40;
    p.d_pitch = p.expand_pitch = chunk + 8;
    p.project_pitch = round_up(p.group_channels, 16) + 8;
    const int in_pixels = p.in_rows * p.in_cols * images;
    const int x_pixels =
        std::min<int64_t>(p.in_rows, sizes.H) * std::min<int64_t>(p.in_cols, sizes.W) * images;
    p.expand_bytes = sizes.expansion ? p.expand_rows * p.expand_pitch * 2 : 0;
    p.project_bytes = chunk * p.project_pitch * 2;
    p.dw_bytes = kernel * kernel * chunk * 2;
    p.bias_bytes = 2 * chunk * 4;
    int end = 0;
    const auto take = [&end](int bytes) {
        const int start = end;
        end += round_up(bytes, 16);
        return start;
    };
    p.x = take(sizes.expansion ? x_pixels * p.x_pitch * 2 : 0);
    p.e = take(in_pixels * p.e_pitch * 2);
    p.d = take(p.pixels * p.d_pitch * 2);
    p.w_expand = take(buffers * p.expand_bytes);
    p.w_project = take(buffers * p.project_bytes);
    p.w_dw = take(2 * p.dw_bytes);
    p.biases = take(2 * p.bias_bytes);
    p.places = take(sizes.expansion ? x_pixels * 2 : 0);
    p.job_table = take(p.jobs * 8);
    p.end = end;
    return p;
}

// Whether this kernel can run the block: whether the smallest tile fits.
inline bool tile_takes(const BlockSizes& sizes, Element element) {
    if (element == Element::single) return false;
    if (sizes.in_channels % 8 || sizes.hidden_channels % 8 || sizes.out_channels % 8) return false;
    if (sizes.in_channels > 4096) return false;
    return lay_out_tile(sizes, 1, 1, 1, 1, 8, 2, 32, 1).end <= kTileSharedBytes;
}

}  // namespace mnv2::cuda
