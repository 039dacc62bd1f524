// Sizes of the tile kernel (tile.cu, cluster.cuh): the tile of the image, how the warps share
// its matrices, and what lies where in shared memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../call.h"

namespace mnv2::cuda {

constexpr int kTileRowsOfMatrices = 4;  // matrices of 16 pixels that a warp projects
constexpr int kTileClusterWarps = 8;    // of a block in a cluster
constexpr int kTileStrip = 2;           // output pixels side by side of one depthwise job
constexpr int kTileUnitPixels = 32;     // of the piece that a warp expands at a time
constexpr int kTilePlacesHead = 16;     // bytes before the places of pixels

// Channels of one depthwise job: as many as leave registers for the sums of the projection.
constexpr int tile_job_channels(bool half_sums) { return half_sums ? 4 : 2; }

// Warps of a block, and of all blocks of a multiprocessor: 128 registers a thread, or 255, as the
// larger kernel size needs, and sums in float along with the most matrices.
constexpr int tile_most_warps(int64_t kernel_size, bool half_sums, int n_tiles) {
    return kernel_size == 3 && (half_sums || n_tiles < 4) ? 16 : 8;
}

// Bytes from one row and column of a depthwise job to the next: of its input and of its output.
struct TileSteps {
    int from_row, from_col, to_row, to_col;
};

struct TilePlan {
    // The tile: rows x cols output pixels of each of `images` whole images, or of a part of one.
    int rows, cols, images;
    int tile_rows, tile_cols;  // tiles of an image
    int in_rows, in_cols;      // of the input under a tile, with halo and padding
    int pixels, x_pixels;      // output pixels of a tile; the most pixels of x that it reads
    // Warps: warps_m x warps_n, each with 4 x n_tiles matrices of 16 x 8 results.
    int warps_m, warps_n, n_tiles;
    int groups, group_channels;  // of output channels, one group a block; padded
    int cluster;                 // blocks that share the hidden channels of a tile, or 1
    int chunk, chunks;           // hidden channels at a time, and how often
    int buffers;                 // of the weights of a chunk
    int unit_tiles;              // groups of 8 channels that a warp expands at a time: 4 or 2
    // Depthwise jobs: strips of two columns by `job_rows` rows.
    int out_step;  // pixels between outputs that are neighbours in a job
    TileSteps steps;
    int strips, segments, jobs, job_rows;  // strips and segments of an image
    int job_rounds;                        // rows of a depthwise job that a thread walks in a chunk
    // Pitches, in elements of 2 bytes: odd multiples of 16 bytes where ldmatrix reads.
    int x_pitch, e_pitch, d_pitch, expand_pitch, project_pitch;
    int expand_rows;  // of w_expand in shared memory
    // Shared memory, in bytes from its start.
    int x, e, d, gathered, w_expand, w_project, w_dw, biases, places, job_table, end;
    int d_bytes, expand_bytes, project_bytes, dw_bytes, bias_bytes;  // of one buffer

    int threads() const { return warps_m * warps_n * 32; }
};

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
inline TilePlan lay_out_tile(const BlockSizes& sizes, Element element, int rows, int cols,
                             int images, int warps_m, int warps_n, int n_tiles, int chunk,
                             int buffers, int cluster = 1) {
    const int in = static_cast<int>(sizes.in_channels), out = static_cast<int>(sizes.out_channels);
    const int kernel_size = static_cast<int>(sizes.kernel_size),
              stride = static_cast<int>(sizes.stride);
    const int extent = static_cast<int>(sizes.dilation) * (kernel_size - 1);
    TilePlan p{};
    p.rows = rows, p.cols = cols, p.images = images;
    p.tile_rows = ceil_div(sizes.H_out, rows);
    p.tile_cols = ceil_div(sizes.W_out, cols);
    p.pixels = rows * cols * images;
    p.warps_m = warps_m, p.warps_n = warps_n, p.n_tiles = n_tiles;
    p.group_channels = warps_n * n_tiles * 8;
    p.cluster = cluster;
    p.groups = cluster > 1 ? cluster : ceil_div(out, p.group_channels);
    p.chunk = chunk, p.buffers = buffers;
    p.chunks = ceil_div(sizes.hidden_channels, chunk);

    p.out_step = tile_out_step(sizes);
    // The last strip may reach past the tile.
    p.in_cols = (round_up(cols, kTileStrip * p.out_step) - 1) * stride + extent + 1;
    p.in_rows = (rows - 1) * stride + extent + 1;
    p.strips = round_up(cols, kTileStrip * p.out_step) / kTileStrip;
    const int job_lanes = chunk / tile_job_channels(half_sums(sizes, element));
    const int jobs_at_once = p.threads() / job_lanes;
    const int ring = (kernel_size - 1) / tile_job_stride(sizes);
    int best_cost = 0;
    for (int parts = 1; parts <= std::min(rows, 16); parts++) {
        const int job_rows = ceil_div(rows, parts * p.out_step);
        const int segments = round_up(rows, job_rows * p.out_step) / job_rows;
        const int jobs = p.strips * segments * images;
        const int cost = ceil_div(jobs, jobs_at_once) * (job_rows + ring);
        if (best_cost == 0 || cost < best_cost)
            best_cost = cost, p.job_rows = job_rows, p.segments = segments, p.jobs = jobs;
    }
    p.job_rounds = best_cost;

    p.x_pitch = round_up(in, 16) + 8;
    p.expand_rows = round_up(in, 16);
    // 8 lanes read one pixel of a strip and 8 the same pixel of the next strip.
    p.e_pitch = chunk == 64 ? 72 : stride * p.out_step == 1 ? 48 : 40;
    p.d_pitch = p.expand_pitch = chunk + 8;
    p.project_pitch = round_up(p.group_channels, 16) + 8;
    p.steps.from_col = static_cast<int>(sizes.dilation) * p.e_pitch * 2;
    p.steps.from_row = p.in_cols * p.steps.from_col;
    p.steps.to_col = p.out_step * p.d_pitch * 2;
    p.steps.to_row = p.cols * p.steps.to_col;
    const int in_pixels = p.in_rows * p.in_cols * images;
    p.x_pixels = static_cast<int>(std::min<int64_t>(p.in_rows, sizes.H) *
                                  std::min<int64_t>(p.in_cols, sizes.W) * images);
    const int units = ceil_div(p.x_pixels, kTileUnitPixels) * chunk / 32;
    const int warps = warps_m * warps_n;
    p.unit_tiles = 5 * ceil_div(units, warps) <= 3 * ceil_div(2 * units, warps) ? 4 : 2;
    p.d_bytes = p.pixels * p.d_pitch * 2;
    p.expand_bytes = sizes.expansion ? p.expand_rows * p.expand_pitch * 2 : 0;
    p.project_bytes = chunk * p.project_pitch * 2;
    p.dw_bytes = kernel_size * kernel_size * chunk * 2;
    p.bias_bytes = 2 * chunk * 4;
    int end = 0;
    const auto take = [&end](int bytes) {
        const int start = end;
        end += round_up(bytes, 16);
        return start;
    };
    p.x = take(sizes.expansion ? p.x_pixels * p.x_pitch * 2 : 0);
    p.e = take(in_pixels * p.e_pitch * 2);
    p.d = take(p.d_bytes);
    p.gathered = take(cluster > 1 ? cluster * p.d_bytes : 0);
    p.w_expand = take(buffers * p.expand_bytes);
    p.w_project = take(std::max(buffers, cluster) * p.project_bytes);
    p.w_dw = take(2 * p.dw_bytes);
    p.biases = take(2 * p.bias_bytes);
    p.places = take(sizes.expansion ? kTilePlacesHead + p.x_pixels * 2 : 0);
    p.job_table = take(p.jobs * 8);
    p.end = end;
    return p;
}

// Matrices side by side of a warp's part of the projection.
inline int tile_n_tiles(const BlockSizes& sizes, int warps_n) {
    return static_cast<int>(std::clamp<int64_t>(ceil_div(sizes.out_channels, warps_n * 8), 2, 4));
}

// Whether this kernel can run the block: whether the smallest tile fits.
inline bool tile_takes(const BlockSizes& sizes, Element element) {
    if (element == Element::single) return false;
    if (sizes.in_channels % 8 || sizes.hidden_channels % 8 || sizes.out_channels % 8) return false;
    if (std::max({sizes.in_channels, sizes.hidden_channels, sizes.out_channels}) > 1 << 16)
        return false;
    const int n_tiles = tile_n_tiles(sizes, 1);
    return lay_out_tile(sizes, element, 1, 1, 1, 4, 1, n_tiles, 32, 1).end <= kSharedBytes;
}

}  // namespace mnv2::cuda
