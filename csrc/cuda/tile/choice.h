// By which plan the tile kernel runs a block: plans are compared by a rough count of cycles.
#pragma once
#include <array>
#include <cmath>
#include <map>

#include "plan.h"

namespace mnv2::cuda::tile {

// Blocks of threads on a multiprocessor. Each block's shared memory takes 1 KB more.
inline int resident_blocks(const BlockSizes& sizes, Element element, const TilePlan& plan,
                           const Device& device) {
    const bool in_half = half_sums(sizes, element);
    return std::min(tile_most_warps(sizes.kernel_size, in_half, plan.n_tiles) * 32 / plan.threads(),
                    (device.shared_bytes + 1024) / (plan.end + 1024));
}

// Rough cycles that a multiprocessor is busy, and those that pass for a block alone.
struct Cycles {
    double busy = 0, alone = 0;

    void add(double work, double latency) {
        busy += work;
        alone += std::max(work, latency);
    }
};

// Expansion and depthwise of a chunk.
inline Cycles chunk_cycles(const BlockSizes& sizes, Element element, const TilePlan& plan) {
    Cycles cycles;
    const double warps = plan.threads() / 32;
    if (sizes.expansion) {
        const double units = std::ceil(plan.x_pixels * 1. / kTileUnitPixels) * plan.chunk / 8;
        const double steps = plan.expand_rows / 16, wide = plan.unit_tiles == 4;
        cycles.add(units * (steps * (wide ? 4.5 : 6) + 12),
                   std::ceil(units / plan.unit_tiles / warps) * (steps * (wide ? 70 : 50) + 250));
    }
    const double taps = static_cast<double>(sizes.kernel_size * sizes.kernel_size);
    cycles.add(plan.job_rounds * warps * (taps + 8) * (half_sums(sizes, element) ? 1.1 : 1.2),
               plan.job_rounds * 150);
    return cycles;
}

// x and y of a tile. Halos come from the second cache, as do the weights.
inline double memory_cycles(const BlockSizes& sizes, const TilePlan& plan) {
    const double own = static_cast<double>(sizes.in_channels * sizes.stride * sizes.stride) +
                       std::min<double>(plan.group_channels, sizes.out_channels);
    return plan.x_pixels * sizes.in_channels / 20 + 2 * plan.pixels * own / 14;
}

inline int64_t count_tiles(const BlockSizes& sizes, const TilePlan& plan) {
    return ceil_div(sizes.N, plan.images) * plan.tile_rows * plan.tile_cols;
}

// Rough cycles for all blocks: by it plans are compared.
inline double cost(const BlockSizes& sizes, Element element, const TilePlan& plan, int resident,
                   int multiprocessors) {
    const double warps = plan.threads() / 32;
    Cycles cycles = chunk_cycles(sizes, element, plan);
    const int m_tiles = ceil_div(plan.pixels, 16);
    const double products = static_cast<double>(m_tiles) * plan.warps_n * plan.n_tiles;
    const double loads = m_tiles * plan.warps_n + warps * plan.n_tiles / 2;
    cycles.add(plan.chunk / 16 * (products * 1.8 + loads * 1.5), plan.chunk / 16 * 150);
    const double weights = (plan.expand_bytes + plan.project_bytes) / 40.;
    cycles.alone += plan.buffers == 1 ? 400 + weights / 2 : 400;

    const double memory = memory_cycles(sizes, plan);
    const double busy = std::max(std::max(cycles.busy, weights) * plan.chunks, memory) + memory / 5;
    const double alone = std::max(cycles.alone, weights) * plan.chunks + memory + 2000;
    const int64_t blocks = count_tiles(sizes, plan) * plan.groups;
    const int64_t slots = static_cast<int64_t>(resident) * multiprocessors;
    double all = static_cast<double>(blocks / slots) * std::max(busy * resident, alone);
    if (blocks % slots != 0)
        all += std::max(busy * ceil_div(blocks % slots, multiprocessors), alone);
    return all;
}

// Cost of a cluster launch. Some multiprocessors cannot host clusters.
inline double cluster_cost(const BlockSizes& sizes, Element element, const TilePlan& plan,
                           int multiprocessors) {
    const double rounds = ceil_div(plan.chunks, plan.cluster);
    const double gathered = std::ceil(plan.cluster * plan.pixels / 64.) * 500;
    const double products = plan.cluster * plan.chunk / 16 * 80;
    const double alone =
        (chunk_cycles(sizes, element, plan).alone + gathered + products + 1500) * rounds +
        memory_cycles(sizes, plan) + 2500;
    return alone *
           ceil_div(count_tiles(sizes, plan) * plan.cluster, std::max(1, multiprocessors * 4 / 5));
}

// The best plan so far.
struct Choice {
    const BlockSizes& sizes;
    const Element element;
    const Device& device;
    TilePlan best{};
    double least = 0;

    void offer(const TilePlan& plan, double cycles) {
        if (best.end == 0 || cycles < least) best = plan, least = cycles;
    }

    // Both numbers of buffers; false where not even one fits.
    bool consider(int rows, int cols, int images, int warps_m, int warps_n, int chunk) {
        for (int buffers = 1; buffers <= 2; buffers++) {
            const TilePlan plan = lay_out_tile(sizes, element, rows, cols, images, warps_m, warps_n,
                                               tile_n_tiles(sizes, warps_n), chunk, buffers);
            const int resident = resident_blocks(sizes, element, plan, device);
            if (resident == 0) return buffers == 2;
            offer(plan, cost(sizes, element, plan, resident, device.multiprocessors));
        }
        return true;
    }

    // Tiles of about equal size, as large as the warps can have and the memory takes.
    void consider_tiles(int warps_m, int warps_n, int chunk) {
        const int height = static_cast<int>(sizes.H_out), width = static_cast<int>(sizes.W_out);
        const int most = warps_m * kTileRowsOfMatrices * 16;
        for (int parts = 1, rows = 0; rows != 1; parts += (parts + 2) / 3) {
            rows = ceil_div(height, parts);
            if (rows > most) continue;
            int cols = ceil_div(width, ceil_div(width, most / rows));
            if (rows == height && cols == width) {
                const int64_t fit = most / (rows * cols);
                for (int64_t images = std::min(sizes.N, fit); images > 1; images /= 2)
                    consider(rows, cols, static_cast<int>(images), warps_m, warps_n, chunk);
            }
            while (!consider(rows, cols, 1, warps_m, warps_n, chunk) && cols > 1)
                cols = (cols + 1) / 2;
        }
    }

    // Two tiles of output channels a warp.
    void consider_clusters(int cluster) {
        const int chunks = ceil_div(sizes.hidden_channels, 64);
        if (cluster > chunks || ceil_div(chunks, cluster) == ceil_div(chunks, cluster - 1)) return;
        int warps_n = 1;
        while (warps_n < kTileClusterWarps && cluster * warps_n * 16 < sizes.out_channels)
            warps_n *= 2;
        if (cluster * warps_n * 16 < sizes.out_channels) return;
        for (int parts = 1, rows = 0; rows != 1; parts++) {
            rows = ceil_div(sizes.H_out, parts);
            const int cols = static_cast<int>(sizes.W_out), warps_m = kTileClusterWarps / warps_n;
            if (rows * cols > warps_m * kTileRowsOfMatrices * 16) continue;
            const TilePlan plan =
                lay_out_tile(sizes, element, rows, cols, 1, warps_m, warps_n, 2, 64, 1, cluster);
            if (resident_blocks(sizes, element, plan, device) > 0)
                offer(plan, cluster_cost(sizes, element, plan, device.multiprocessors));
        }
    }
};

// For a block that tile_takes. Tiles, chunks and clusters may depend on anything: the sums of an
// output have one order in all of them, channel by channel.
inline TilePlan plan_tile(const BlockSizes& sizes, Element element, const Device& device) {
    Choice choice{sizes, element, device};
    for (const int chunk : {64, 32}) {
        if (chunk == 64 ? sizes.hidden_channels <= 32 : choice.best.end != 0) continue;
        for (int warps = 4; warps <= 16; warps *= 2) {
            for (int warps_m = 1; warps_m <= warps; warps_m *= 2) {
                const int warps_n = warps / warps_m;
                if (warps_n == 1 || warps_n * 8 < sizes.out_channels)
                    choice.consider_tiles(warps_m, warps_n, chunk);
            }
        }
    }
    if (device.capability >= 90)
        for (int cluster = 2; cluster <= device.cluster; cluster++)
            choice.consider_clusters(cluster);
    return choice.best;
}

// The same, remembered: the search takes longer than a launch.
inline const TilePlan& known_plan(const BlockSizes& sizes, Element element, const Device& device) {
    using Key = std::array<int64_t, 16>;
    thread_local std::map<Key, TilePlan> plans;
    const Key key{sizes.N,
                  sizes.H,
                  sizes.W,
                  sizes.H_out,
                  sizes.W_out,
                  sizes.in_channels,
                  sizes.hidden_channels,
                  sizes.out_channels,
                  sizes.kernel_size,
                  sizes.stride,
                  sizes.dilation,
                  sizes.expansion * 2 + half_sums(sizes, element),
                  device.multiprocessors,
                  device.shared_bytes,
                  device.capability,
                  device.cluster};
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
    if (plans.size() == 1024) plans.clear();
    return plans[key] = plan_tile(sizes, element, device);
}

}  // namespace mnv2::cuda::tile
