// By which plan the tile kernel runs a block: plans are compared by the instructions that they
// issue, counted from the kernel's loops.
#pragma once
#include <algorithm>

#include "plan.h"

namespace mnv2::cuda::tile {

// Blocks of threads on a multiprocessor. Each block's shared memory takes 1 KB more.
inline int resident_blocks(const BlockSizes& sizes, Element element, const TilePlan& plan,
                           const Device& device) {
    return std::min(tile_most_warps(half_sums(sizes, element), plan.n_tiles) / plan.warps(),
                    (device.shared_bytes + 1024) / (plan.end + 1024));
}

inline int64_t count_tiles(const BlockSizes& sizes, const TilePlan& plan) {
    return ceil_div(sizes.N, plan.images) * plan.tile_rows * plan.tile_cols;
}

// Instructions of the warp that has most to do, for expansion and depthwise of a chunk. These
// numbers and those below are of machine code for compute capability 9.0.
inline int64_t chunk_instructions(const BlockSizes& sizes, Element element, const TilePlan& plan) {
    const int64_t taps = sizes.kernel_size * sizes.kernel_size;
    const int64_t units = ceil_div(ceil_div(plan.x_pixels, kTileUnitPixels), plan.parts);
    const int64_t rounds = ceil_div(ceil_div(plan.jobs, 8), plan.parts);
    // Of four channels and four outputs: two multiply-adds of pairs a tap, or four of floats.
    const int64_t job = half_sums(sizes, element) ? 8 * taps + 75 : 22 * taps + 120;
    return 190 + rounds * job + (sizes.expansion ? units * (plan.expand_rows / 16 * 11 + 80) : 0);
}

// The same for the projection of a chunk.
inline int64_t project_instructions(const TilePlan& plan) {
    const int64_t m_tiles = ceil_div(ceil_div(plan.pixels, 16), plan.warps_m);
    return 30 + plan.chunk / 16 * (m_tiles * (plan.n_tiles + 1) + plan.n_tiles / 2 + 9);
}

// The same for copying `bytes` to shared memory, by all warps.
inline int64_t copy_instructions(const TilePlan& plan, int64_t bytes) {
    return 40 + ceil_div(bytes, 512 * plan.warps()) * 9;
}

// What a warp does once a tile.
inline int64_t tile_instructions(const BlockSizes& sizes, const TilePlan& plan) {
    const int64_t outputs = ceil_div(ceil_div(plan.pixels, 16), plan.warps_m) * 2;
    return 900 + copy_instructions(plan, plan.x_pixels * sizes.in_channels * 2 * 2 + plan.e_bytes) +
           outputs * (20 + plan.n_tiles * 9);
}

// Cycles of all blocks. A multiprocessor issues four instructions a cycle, and one warp alone one
// in `kAlone` cycles.
inline double cycles(int64_t blocks, int resident, int multiprocessors, int warps,
                     int64_t instructions) {
    constexpr double kAlone = 2;
    const auto of = [&](int64_t together) {
        return static_cast<double>(instructions) *
               std::max(kAlone, static_cast<double>(together * warps) / 4);
    };
    const int64_t slots = static_cast<int64_t>(resident) * multiprocessors;
    const int64_t rest = blocks % slots;
    return static_cast<double>(blocks / slots) * of(resident) +
           (rest > 0 ? of(ceil_div(rest, multiprocessors)) : 0);
}

// Cycles of a plan without a cluster.
inline double cost(const BlockSizes& sizes, Element element, const TilePlan& plan, int resident,
                   int multiprocessors) {
    const int64_t chunk = chunk_instructions(sizes, element, plan) + project_instructions(plan) +
                          copy_instructions(plan, plan.expand_bytes + plan.project_bytes);
    return cycles(count_tiles(sizes, plan) * plan.groups, resident, multiprocessors, plan.warps(),
                  plan.chunks * chunk + tile_instructions(sizes, plan));
}

// Cycles of a plan with one. Some multiprocessors cannot host clusters.
inline double cluster_cost(const BlockSizes& sizes, Element element, const TilePlan& plan,
                           int multiprocessors) {
    const int64_t gathered = plan.cluster * plan.d_bytes;
    // Each of the two barriers takes the time of some hundred instructions.
    const int64_t round =
        chunk_instructions(sizes, element, plan) + plan.cluster * project_instructions(plan) +
        copy_instructions(plan, plan.expand_bytes + plan.cluster * plan.project_bytes) +
        copy_instructions(plan, gathered) + 400;
    return cycles(count_tiles(sizes, plan) * plan.cluster, 1, std::max(1, multiprocessors * 4 / 5),
                  plan.warps(),
                  ceil_div(plan.chunks, plan.cluster) * round + tile_instructions(sizes, plan));
}

// The best plan so far.
struct Choice {
    const BlockSizes& sizes;
    const Element element;
    const Device& device;
    TilePlan best{};
    double least = 0;

    // False where there is no room for it.
    bool offer(const TilePlan& plan) {
        const int resident = resident_blocks(sizes, element, plan, device);
        if (resident == 0) return false;
        const double cycles = plan.cluster > 1
                                  ? cluster_cost(sizes, element, plan, device.multiprocessors)
                                  : cost(sizes, element, plan, resident, device.multiprocessors);
        if (best.end == 0 || cycles < least) best = plan, least = cycles;
        return true;
    }

    // Tiles of about equal size, as large as the warps can have, in one image or several.
    void consider_tiles(int chunk, int parts, int warps_m, int cluster) {
        const int height = static_cast<int>(sizes.H_out), width = static_cast<int>(sizes.W_out);
        const int most = warps_m * kTileRowsOfMatrices * 16;
        for (int rows = even(height, most); rows > 0; rows = even(height, rows - 1)) {
            const int widest = std::min(width, most / rows);
            bool fits = false;
            // Much narrower ones only where these have no room.
            for (int cols = even(width, widest); cols > 0 && (!fits || 2 * cols >= widest);
                 cols = even(width, cols - 1)) {
                const bool whole = rows == height && cols == width && cluster == 1;
                const int64_t fit = whole ? std::min<int64_t>(sizes.N, most / (rows * cols)) : 1;
                for (int64_t images = fit; images > 0; images /= 2)
                    fits |= offer(lay_out_tile(sizes, rows, cols, static_cast<int>(images), chunk,
                                               parts, warps_m, cluster));
            }
        }
    }

    // The length of equal pieces of a whole: of as few as are no longer than `most`.
    static int even(int whole, int most) {
        return most == 0 ? 0 : static_cast<int>(ceil_div(whole, ceil_div(whole, most)));
    }

    // All ways to share the work among four or eight warps. Every group of output channels takes an
    // expansion of its own: `few_groups` leaves out what has more of them than it takes.
    void consider(int chunk, int cluster, bool few_groups) {
        const int slices = chunk / kTileSlice;
        for (int warps = std::max(4, slices); warps <= kTileMostWarps; warps *= 2) {
            const auto groups = [&](int columns) {
                return ceil_div(sizes.out_channels, columns * kTileMostColumns);
            };
            for (int warps_m = 1; warps_m <= warps; warps_m *= 2) {
                const int columns = warps / warps_m;
                // A cluster has all output channels at once.
                if (cluster > 1 ? cluster * columns * 16 < sizes.out_channels
                                : few_groups && groups(columns) > groups(warps))
                    continue;
                consider_tiles(chunk, warps / slices, warps_m, cluster);
            }
        }
    }
};

// For a block that tile_takes. Tiles, chunks and clusters may depend on anything: the sums of an
// output have one order in all of them, channel by channel.
inline TilePlan plan_tile(const BlockSizes& sizes, Element element, const Device& device) {
    Choice choice{sizes, element, device};
    for (int chunk = kTileMostWarps * kTileSlice; chunk >= kTileSlice; chunk /= 2)
        // Smaller ones are for blocks of few hidden channels, or of many others.
        if (chunk == kTileSlice || sizes.hidden_channels > chunk / 2)
            if (chunk >= 64 || choice.best.end == 0) choice.consider(chunk, 1, true);
    if (choice.best.end == 0) choice.consider(kTileSlice, 1, false);
    if (device.capability >= 90) {
        const int chunks = ceil_div(sizes.hidden_channels, 64);
        for (int cluster = 2; cluster <= std::min(device.cluster, chunks); cluster++)
            if (ceil_div(chunks, cluster) < ceil_div(chunks, cluster - 1))
                choice.consider(64, cluster, true);
    }
    return choice.best;
}

}  // namespace mnv2::cuda::tile
