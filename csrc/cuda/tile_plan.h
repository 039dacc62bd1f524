// Sizes of the tile kernel (tile.cu): the tile of the image, how the warps share its matrices, and
// what lies where in shared memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "call.h"

namespace mnv2::cuda {

constexpr int kTileRowsOfMatrices = 4;       // tiles of 16 pixels that a warp projects
constexpr int kTileStrip = 2;                // output pixels side by side of one depthwise job
constexpr int kTileUnitPixels = 32;          // of the piece that a warp expands at a time
constexpr int kTilePlacesHead = 16;          // bytes before the places of pixels
constexpr int kTileSharedBytes = 163 << 10;  // of a block on every GPU of capability 8.0 and 9.0

// Channels of one depthwise job: as many as leave registers for the sums of the projection.
constexpr int tile_job_channels(bool half_sums) { return half_sums ? 4 : 2; }

// Warps of a block, and of all blocks of a multiprocessor: 128 registers a thread or, as the larger
// kernel needs, 255.
constexpr int tile_most_warps(int64_t kernel) { return kernel == 3 ? 16 : 8; }

namespace tile {
constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }
constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
}  // namespace tile

// Bytes from one row and column of a depthwise job to the next: of its input and of its output.
struct TileSteps {
    int from_row, from_col, to_row, to_col;
};

struct TilePlan {
    // The tile: rows x cols output pixels of each of `images` whole images, or of a part of one.
    int rows, cols, images;
    int tile_rows, tile_cols;  // tiles of an image
    int in_rows, in_cols;      // of the input under a tile, with halo and padding
    int pixels;                // output pixels of a tile
    // Warps: warps_m x warps_n, each with 4 x n_tiles matrices of 16 x 8 results.
    int warps_m, warps_n, n_tiles;
    int groups, group_channels;  // of output channels, one group a block; padded
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
inline TilePlan lay_out_tile(const BlockSizes& sizes, Element element, int rows, int cols,
                             int images, int warps_m, int warps_n, int n_tiles, int chunk,
                             int buffers) {
    const int in = static_cast<int>(sizes.in_channels), out = static_cast<int>(sizes.out_channels);
    const int kernel = static_cast<int>(sizes.kernel), stride = static_cast<int>(sizes.stride);
    const int extent = static_cast<int>(sizes.dilation) * (kernel - 1);
    TilePlan p{};
    p.rows = rows, p.cols = cols, p.images = images;
    p.tile_rows = tile::ceil_div(sizes.H_out, rows);
    p.tile_cols = tile::ceil_div(sizes.W_out, cols);
    p.pixels = rows * cols * images;
    p.warps_m = warps_m, p.warps_n = warps_n, p.n_tiles = n_tiles;
    p.group_channels = warps_n * n_tiles * 8;
    p.groups = tile::ceil_div(out, p.group_channels);
    p.chunk = chunk, p.buffers = buffers;
    p.chunks = tile::ceil_div(sizes.hidden_channels, chunk);

    p.out_step = tile_out_step(sizes);
    // The last strip may reach past the tile.
    p.in_cols = (tile::round_up(cols, kTileStrip * p.out_step) - 1) * stride + extent + 1;
    p.in_rows = (rows - 1) * stride + extent + 1;
    p.strips = tile::round_up(cols, kTileStrip * p.out_step) / kTileStrip;
    const int lanes = p.threads() / (chunk / tile_job_channels(tile_half_sums(sizes, element))),
              ring = (kernel - 1) / tile_job_stride(sizes);
    int best_cost = 0;
    for (int parts = 1; parts <= std::min(rows, 16); parts++) {
        const int job_rows = tile::ceil_div(rows, parts * p.out_step);
        const int segments = tile::round_up(rows, job_rows * p.out_step) / job_rows;
        const int jobs = p.strips * segments * images;
        const int cost = tile::ceil_div(jobs, lanes) * (job_rows + ring);
        if (best_cost == 0 || cost < best_cost)
            best_cost = cost, p.job_rows = job_rows, p.segments = segments, p.jobs = jobs;
    }
    p.job_rounds = best_cost;

    p.x_pitch = tile::round_up(in, 16) + 8;
    p.expand_rows = tile::round_up(in, 16);
    // 8 lanes read one pixel of a strip and 8 the same pixel of the next strip.
    p.e_pitch = chunk == 64 ? 72 : stride * p.out_step == 1 ? 48 : 40;
    p.d_pitch = p.expand_pitch = chunk + 8;
    p.project_pitch = tile::round_up(p.group_channels, 16) + 8;
    p.steps.from_col = static_cast<int>(sizes.dilation) * p.e_pitch * 2;
    p.steps.from_row = p.in_cols * p.steps.from_col;
    p.steps.to_col = p.out_step * p.d_pitch * 2;
    p.steps.to_row = p.cols * p.steps.to_col;
    const int in_pixels = p.in_rows * p.in_cols * images;
    const int x_pixels =
        std::min<int64_t>(p.in_rows, sizes.H) * std::min<int64_t>(p.in_cols, sizes.W) * images;
    const int units = tile::ceil_div(x_pixels, kTileUnitPixels) * chunk / 32;
    const int warps = warps_m * warps_n;
    p.unit_tiles = 5 * tile::ceil_div(units, warps) <= 3 * tile::ceil_div(2 * units, warps) ? 4 : 2;
    p.expand_bytes = sizes.expansion ? p.expand_rows * p.expand_pitch * 2 : 0;
    p.project_bytes = chunk * p.project_pitch * 2;
    p.dw_bytes = kernel * kernel * chunk * 2;
    p.bias_bytes = 2 * chunk * 4;
    int end = 0;
    const auto take = [&end](int bytes) {
        const int start = end;
        end += tile::round_up(bytes, 16);
        return start;
    };
    p.x = take(sizes.expansion ? x_pixels * p.x_pitch * 2 : 0);
    p.e = take(in_pixels * p.e_pitch * 2);
    p.d = take(p.pixels * p.d_pitch * 2);
    p.w_expand = take(buffers * p.expand_bytes);
    p.w_project = take(buffers * p.project_bytes);
    p.w_dw = take(2 * p.dw_bytes);
    p.biases = take(2 * p.bias_bytes);
    p.places = take(sizes.expansion ? kTilePlacesHead + x_pixels * 2 : 0);
    p.job_table = take(p.jobs * 8);
    p.end = end;
    return p;
}

// Blocks of threads on a multiprocessor. Each block's shared memory takes 1 KB more.
inline int tile_resident(const TilePlan& plan, int64_t kernel, int shared_bytes) {
    return std::min(tile_most_warps(kernel) * 32 / plan.threads(),
                    (shared_bytes + 1024) / (plan.end + 1024));
}

// Rough cycles of a multiprocessor for all blocks: by it plans are compared.
inline double tile_cost(const BlockSizes& sizes, Element element, const TilePlan& plan,
                        int resident, int multiprocessors) {
    const double warps = plan.threads() / 32;
    // Of one chunk: cycles that the multiprocessor is busy, and those that pass for a block alone.
    double busy = 0, alone = 400;
    const auto phase = [&](double work, double latency) {
        busy += work;
        alone += std::max(work, latency);
    };
    const int m_tiles = tile::ceil_div(plan.pixels, 16);
    const double in_pixels = std::min<double>(plan.in_rows, sizes.H) *
                             std::min<double>(plan.in_cols, sizes.W) * plan.images;
    if (sizes.expansion) {
        const double units = std::ceil(in_pixels / kTileUnitPixels) * plan.chunk / 8;
        const double rounds = std::ceil(units / plan.unit_tiles / warps);
        const double steps = plan.expand_rows / 16;
        phase(units * (steps * (plan.unit_tiles == 4 ? 4.5 : 6) + 12),
              rounds * (steps * (plan.unit_tiles == 4 ? 70 : 50) + 250));
    }
    const double products = static_cast<double>(m_tiles) * plan.warps_n * plan.n_tiles;
    const double loads = m_tiles * plan.warps_n + warps * plan.n_tiles / 2;
    phase(plan.chunk / 16 * (products * 1.8 + loads * 1.5), plan.chunk / 16 * 150);
    const double taps = static_cast<double>(sizes.kernel * sizes.kernel);
    phase(plan.job_rounds * warps * (taps + 8) * (tile_half_sums(sizes, element) ? 1.1 : 1.2),
          plan.job_rounds * 150);
    const double weights = (plan.expand_bytes + plan.project_bytes) / 40.;
    alone = std::max(plan.buffers == 1 ? alone + weights / 2 : alone, weights);
    busy = std::max(busy, weights);

    // Halos come from the second cache, as do the weights.
    const double halo = in_pixels * sizes.in_channels / 20;
    const double own = static_cast<double>(sizes.in_channels * sizes.stride * sizes.stride) +
                       std::min<double>(plan.group_channels, sizes.out_channels);
    const double memory = halo + 2 * plan.pixels * own / 14;
    busy = std::max(busy * plan.chunks, memory) + halo / 2;
    alone = alone * plan.chunks + memory + 2000;
    const int64_t blocks = static_cast<int64_t>(tile::ceil_div(sizes.N, plan.images)) *
                           plan.tile_rows * plan.tile_cols * plan.groups;
    const int64_t slots = static_cast<int64_t>(resident) * multiprocessors;
    double cycles = static_cast<double>(blocks / slots) * std::max(busy * resident, alone);
    if (blocks % slots != 0)
        cycles += std::max(busy * tile::ceil_div(blocks % slots, multiprocessors), alone);
    return cycles;
}

// The plan for a GPU; its `end` is 0 where none fits. Chunks and tiles may depend on anything: the
// sums of an output have one order, channel by channel, in all of them.
inline TilePlan plan_tile(const BlockSizes& sizes, Element element, int shared_bytes,
                          int multiprocessors) {
    const int height = static_cast<int>(sizes.H_out), width = static_cast<int>(sizes.W_out);
    const int64_t batch = sizes.N;
    TilePlan best{};
    double best_cost = 0;
    const auto consider = [&](const TilePlan& plan) {
        const int resident = tile_resident(plan, sizes.kernel, shared_bytes);
        if (resident == 0) return 0;
        const double cost = tile_cost(sizes, element, plan, resident, multiprocessors);
        if (best.end == 0 || cost < best_cost) best = plan, best_cost = cost;
        return resident;
    };
    const auto consider_tile = [&](int rows, int cols, int images, int warps_m, int warps_n,
                                   int chunk) {
        const int n_tiles = std::clamp(tile::ceil_div(sizes.out_channels, warps_n * 8), 2, 4);
        const auto with = [&](int buffers) {
            return consider(lay_out_tile(sizes, element, rows, cols, images, warps_m, warps_n,
                                         n_tiles, chunk, buffers));
        };
        if (with(1) != 0) with(2);
    };
    for (const int chunk : {64, 32}) {
        if (chunk == 64 ? sizes.hidden_channels <= 32 : best.end != 0) continue;
        for (int warps = 4; warps <= tile_most_warps(sizes.kernel); warps *= 2) {
            for (int warps_m = 1; warps_m <= warps; warps_m *= 2) {
                const int warps_n = warps / warps_m, most = warps_m * kTileRowsOfMatrices * 16;
                if (warps_n > 1 && warps_n * 8 >= sizes.out_channels) continue;
                for (int parts = 1, rows = 0; rows != 1; parts += (parts + 2) / 3) {
                    rows = tile::ceil_div(height, parts);
                    if (rows > most) continue;
                    const int cols = tile::ceil_div(width, tile::ceil_div(width, most / rows));
                    const bool whole = rows == height && cols == width;
                    const int images =
                        whole ? static_cast<int>(std::min<int64_t>(batch, most / (rows * cols)))
                              : 1;
                    for (int some = images; some > 0; some /= 2)
                        consider_tile(rows, cols, some, warps_m, warps_n, chunk);
                }
            }
        }
    }
    return best;
}

// Whether this kernel can run the block: whether the smallest tile fits.
inline bool tile_takes(const BlockSizes& sizes, Element element) {
    if (element == Element::single) return false;
    if (sizes.in_channels % 8 || sizes.hidden_channels % 8 || sizes.out_channels % 8) return false;
    if (std::max({sizes.in_channels, sizes.hidden_channels, sizes.out_channels}) > 1 << 16)
        return false;
    return lay_out_tile(sizes, element, 1, 1, 1, 4, 1, 2, 32, 1).end <= kTileSharedBytes;
}

}  // namespace mnv2::cuda
