// Sizes of the patch kernel (patch.cu): of its instances, of a tile of the image, of shared memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../call.h"

namespace mnv2::cuda {

constexpr int kWarp = 32;
constexpr int kPatchesPerUnit = 8;
constexpr int kPatchWarps = 4;
constexpr int kPatchThreads = kPatchWarps * kWarp;
constexpr int kPatchChunk = 16;  // hidden channels that a warp has in registers at a time

// Of one instance: whether the depthwise is summed in fp16 and whether there is an expansion, the
// most channels of x and y, and the output pixels of one patch. Units are elements of 2 bytes.
template <bool HalfSums, bool Expands, int InChannels, int OutChannels, int Stride, int PatchRows,
          int PatchCols>
struct PatchSizes {
    static constexpr bool kHalfSums = HalfSums, kExpands = Expands;
    static constexpr int kIn = InChannels, kOut = OutChannels, kStride = Stride;
    static constexpr int kRows = PatchRows, kCols = PatchCols;
    static constexpr int kPixels = kRows * kCols;
    // Input rows and columns from one patch to the next, and those that one patch reads. Pixels are
    // read in pairs, so a last column without use makes their number even.
    static constexpr int kStepRows = kRows * kStride, kStepCols = kCols * kStride;
    static constexpr int kSlotRows = (kRows - 1) * kStride + 3;
    static constexpr int kUsedSlotCols = (kCols - 1) * kStride + 3;
    static constexpr int kSlotCols = kUsedSlotCols + kUsedSlotCols % 2;
    static constexpr int kInOctets = kIn / 8, kOutTiles = kOut / 8;
    // A warp reads one pixel of eight patches at a time, 16 bytes of each, or 32 where there is no
    // expansion: they lie an odd number of so many bytes apart.
    static constexpr int kAtOnce = kExpands ? 8 : 16;
    static constexpr int kColSkew = kStepCols * kIn / kAtOnce % 2 == 0 ? kAtOnce : 0;
    static constexpr int kPatchPitch = kStepCols * kIn + kColSkew;
    static_assert(kIn % 8 == 0 && kOut % 8 == 0 && kPixels % 2 == 0 && kStepCols % 2 == 0);

    // What a lane needs of a chunk beside matrices, in bytes: two channels of each group of 8, as
    // the sums are. The tenth tap is the bias of the depthwise; behind it is that of the expansion.
    static constexpr int kTapBytes = kHalfSums ? 8 : 16, kExpandBias = 10 * kTapBytes;
    static constexpr int kLaneBytes = kHalfSums ? 112 : 208;
    static_assert(kLaneBytes / 16 % 2 == 1 && kLaneBytes >= kExpandBias + 32);

    static constexpr int slot_col(int col) { return col * kIn + col / kStepCols * kColSkew; }
};

// A tile: patches next to one another and below one another, in that order eight a unit. A warp
// takes one unit at a time.
struct PatchTile {
    int patch_cols, patch_rows;  // of a tile
    int tile_cols, tile_rows;    // of an image
    int rows, cols;              // of x under a tile
    int row_pitch;               // from one row of x to the next, elements
    int patch_row_pitch;         // from the first row under a patch to that under the next
    int x_elements;              // of shared memory
};

template <class Sizes>
constexpr PatchTile patch_tile(int patch_cols, int patch_rows, int64_t height_out,
                               int64_t width_out) {
    PatchTile tile{};
    tile.patch_cols = patch_cols, tile.patch_rows = patch_rows;
    tile.tile_cols = static_cast<int>(ceil_div(width_out, patch_cols * Sizes::kCols));
    tile.tile_rows = static_cast<int>(ceil_div(height_out, patch_rows * Sizes::kRows));
    tile.cols = (patch_cols - 1) * Sizes::kStepCols + Sizes::kSlotCols;
    tile.rows = (patch_rows - 1) * Sizes::kStepRows + Sizes::kSlotRows;
    tile.row_pitch = Sizes::slot_col(tile.cols - 1) + Sizes::kIn;
    // The next patch of a warp may be the first one of the next row of patches: it must lie as far
    // away, in banks, as its neighbour would.
    tile.patch_row_pitch = Sizes::kStepRows * tile.row_pitch;
    while ((tile.patch_row_pitch - patch_cols * Sizes::kPatchPitch) / 8 % 8 != 0)
        tile.patch_row_pitch += 8;
    const int last = tile.rows - 1;
    tile.x_elements = last / Sizes::kStepRows * tile.patch_row_pitch +
                      (last % Sizes::kStepRows + 1) * tile.row_pitch;
    return tile;
}

// The weights in shared memory, in bytes from its start; x follows them.
struct PatchWeights {
    int chunks;  // of hidden channels
    int expand, of_lanes, project, bias, end;
};

template <class Sizes>
constexpr PatchWeights patch_weights(int64_t hidden_channels) {
    PatchWeights weights{};
    weights.chunks = static_cast<int>(ceil_div(hidden_channels, kPatchChunk));
    weights.expand = 0;
    weights.of_lanes = Sizes::kExpands ? weights.chunks * kPatchChunk * Sizes::kIn * 2 : 0;
    weights.project = weights.of_lanes + weights.chunks * 4 * Sizes::kLaneBytes;
    weights.bias = weights.project + weights.chunks * kPatchChunk * Sizes::kOut * 2;
    weights.end = weights.bias + Sizes::kOut * 4;
    return weights;
}

// Instructions of a scheduler, roughly: of the busiest multiprocessor and of the average one,
// added. The warps of a block run on one scheduler each.
template <class Sizes>
constexpr int64_t patch_cost(const PatchTile& tile, const BlockSizes& sizes, const Device& device) {
    const auto units_of = [&](int64_t patch_rows) {
        return ceil_div(patch_rows * tile.patch_cols, kPatchesPerUnit);
    };
    const int64_t chunks = ceil_div(sizes.hidden_channels, kPatchChunk);
    constexpr int of_pixel = Sizes::kHalfSums ? 20 : 40;
    const int64_t of_unit =
        chunks * (Sizes::kSlotRows * Sizes::kSlotCols * 7 + Sizes::kPixels * of_pixel + 30);
    const int64_t of_rows = tile.rows * (40 + tile.cols * Sizes::kInOctets / 4);
    const int64_t units = units_of(tile.patch_rows);
    const int64_t columns = sizes.N * tile.tile_cols, tiles = columns * tile.tile_rows;
    const int64_t last_rows =
        ceil_div(sizes.H_out, Sizes::kRows) - (tile.tile_rows - 1) * tile.patch_rows;
    const int64_t all_units = tiles * units - columns * (units - units_of(last_rows));

    // Two blocks share the busiest multiprocessor if they find room; one that is alone is no
    // faster. In each all warps wait for the one that has most units of a tile.
    const int weight_bytes = patch_weights<Sizes>(sizes.hidden_channels).end;
    const int shared_bytes = weight_bytes + tile.x_elements * 2;
    const int resident = 2 * shared_bytes <= device.shared_bytes ? 2 : 1;
    const int64_t rounds = ceil_div(tiles, device.multiprocessors);
    const int64_t busiest = 2 * ceil_div(rounds, resident) * round_up(units, kPatchWarps);
    const int64_t of_weights = weight_bytes / 32;
    return (busiest * of_unit + std::min<int64_t>(rounds, resident) * of_weights +
            rounds * of_rows + (all_units * of_unit + tiles * of_rows) / device.multiprocessors) /
           kPatchWarps;
}

struct PatchChoice {
    PatchTile tile;  // of no columns where shared memory has room for none
    int64_t cost = INT64_MAX;
};

// The shape of the tiles.
template <class Sizes>
constexpr PatchChoice best_patch_tile(const BlockSizes& sizes, const Device& device) {
    const int weight_bytes = patch_weights<Sizes>(sizes.hidden_channels).end;
    const auto cols = static_cast<int>(ceil_div(sizes.W_out, Sizes::kCols));
    constexpr int most = 2 * kPatchWarps * kPatchesPerUnit;
    PatchChoice best{};
    for (int patch_cols = 1; patch_cols <= std::min(most, cols); patch_cols++) {
        // Others leave more patches of the last tile empty.
        if (patch_cols != ceil_div(cols, ceil_div(cols, patch_cols))) continue;
        int patch_rows = 0;
        for (int patches = kPatchesPerUnit; patches <= most; patches += kPatchesPerUnit) {
            if (patch_rows == patches / patch_cols) continue;
            patch_rows = patches / patch_cols;
            const PatchTile tile =
                patch_tile<Sizes>(patch_cols, patch_rows, sizes.H_out, sizes.W_out);
            if (weight_bytes + tile.x_elements * 2 > kSharedBytes) continue;
            const int64_t cost = patch_cost<Sizes>(tile, sizes, device);
            if (cost < best.cost) best = {tile, cost};
        }
    }
    return best;
}

// The same block in small patches, for few of them: the order of all sums is the same.
template <class Sizes>
using SmallPatches =
    PatchSizes<Sizes::kHalfSums, Sizes::kExpands, Sizes::kIn, Sizes::kOut, Sizes::kStride, 1, 2>;

// Calls `use` with the PatchSizes of the instance for a block, if there is one.
template <bool HalfSums, class Use>
constexpr void with_patch_sizes(const BlockSizes& sizes, Use&& use) {
    const int64_t in = sizes.in_channels, out = sizes.out_channels;
    if (in > 32 || out > 32) return;
    if (!sizes.expansion) {
        if constexpr (!HalfSums) {
            if (sizes.stride == 2)
                use(PatchSizes<HalfSums, false, 32, 32, 2, 2, 4>{});
            else
                out <= 16 ? use(PatchSizes<HalfSums, false, 32, 16, 1, 4, 4>{})
                          : use(PatchSizes<HalfSums, false, 32, 32, 1, 2, 4>{});
        }
    } else if (sizes.stride == 1) {
        // Sums in float take the registers of half the pixels.
        in <= 24 && out <= 24 ? use(PatchSizes<HalfSums, true, 24, 24, 1, HalfSums ? 4 : 2, 4>{})
                              : use(PatchSizes<HalfSums, true, 32, 32, 1, 2, 4>{});
    } else if (in <= 16 && out <= 24) {
        use(PatchSizes<HalfSums, true, 16, 24, 2, 2, 4>{});
    } else {
        in <= 24 ? use(PatchSizes<HalfSums, true, 24, 32, 2, 2, 4>{})
                 : use(PatchSizes<HalfSums, true, 32, 32, 2, 2, 2>{});
    }
}

// Whether this kernel is the one for the block. Narrow images leave most of a warp's patches empty.
inline bool patch_takes(const BlockSizes& sizes, Element element) {
    if (element == Element::single) return false;
    if (sizes.kernel_size != 3 || sizes.dilation != 1) return false;
    if (sizes.in_channels % 8 || sizes.hidden_channels % 8 || sizes.out_channels % 8) return false;
    if (sizes.expansion && sizes.clip_expand.lower != 0) return false;
    if (sizes.clip_dw.lower != 0) return false;
    if (sizes.H_out < 20 || sizes.W_out < 20) return false;
    bool fits = false;
    const auto check = [&](auto instance) {
        using Sizes = decltype(instance);
        fits = best_patch_tile<Sizes>(sizes, Device{1, kSharedBytes, 80}).tile.patch_cols > 0;
    };
    if (half_sums(sizes, element))
        with_patch_sizes<true>(sizes, check);
    else
        with_patch_sizes<false>(sizes, check);
    return fits;
}

}  // namespace mnv2::cuda
