// Sizes of the patch kernel (patch.cu): of its instances, of a tile of the image, of shared memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../call.h"

namespace mnv2::cuda {

constexpr int kWarp = 32;
constexpr int kPatchesPerWarp = 8;
constexpr int kPatchWarps = 4;
constexpr int kPatchThreads = kPatchWarps * kWarp;
constexpr int kPatchChunk = 16;  // hidden channels that a warp has in registers at a time
constexpr int kBiasChannels = 8;

// Of one instance: the most channels of x and y, and the output pixels of one patch. Units are
// elements of 2 bytes.
template <int InChannels, int OutChannels, int Stride, int PatchRows, int PatchCols>
struct PatchSizes {
    static constexpr int kIn = InChannels, kOut = OutChannels, kStride = Stride;
    static constexpr int kRows = PatchRows, kCols = PatchCols;
    static constexpr int kPixels = kRows * kCols;
    // Input rows and columns from one patch to the next, and those that one patch reads. Pixels are
    // read in pairs, so a last column without use makes their number even.
    static constexpr int kStepRows = kRows * kStride, kStepCols = kCols * kStride;
    static constexpr int kSlotRows = (kRows - 1) * kStride + 3;
    static constexpr int kUsedSlotCols = (kCols - 1) * kStride + 3;
    static constexpr int kSlotCols = kUsedSlotCols + kUsedSlotCols % 2;
    // A pixel of x has channels of its own for the bias of the expansion: 1 inside the image and 0
    // outside, where all of the clipped expansion is 0 then.
    static constexpr int kPixelPitch = kIn + kBiasChannels;
    static constexpr int kProducts16 = kPixelPitch / 16, kProducts8 = kPixelPitch % 16 / 8;
    // Rows of w_expand and its bias in shared memory, as many as are loaded at a time.
    static constexpr int kExpandRows = round_up(kPixelPitch, 16);
    static constexpr int kOutTiles = kOut / 8;
    // ldmatrix reads one pixel of eight patches: they lie an odd number of 16 bytes apart.
    static constexpr int kColSkew = kStepCols * kPixelPitch / 8 % 2 == 0 ? 8 : 0;
    static constexpr int kPatchPitch = kStepCols * kPixelPitch + kColSkew;
    static_assert(kIn % 8 == 0 && kOut % 8 == 0 && kPixels % 2 == 0 && kStepCols % 2 == 0);

    static constexpr int slot_col(int col) {
        return col * kPixelPitch + col / kStepCols * kColSkew;
    }
};

// A tile: patches next to one another and below one another, eight a warp in that order.
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
    tile.row_pitch = Sizes::slot_col(tile.cols - 1) + Sizes::kPixelPitch;
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
    int chunks;                    // of hidden channels, the last one filled up with zeros
    int dw_chunk;                  // bytes of w_dw and b_dw of a chunk
    int expand, dw, project, end;  // offsets
};

template <class Sizes>
constexpr PatchWeights patch_weights(int64_t hidden_channels, bool half_sums) {
    PatchWeights weights{};
    weights.chunks = static_cast<int>(ceil_div(hidden_channels, kPatchChunk));
    weights.dw_chunk = kPatchChunk * (9 * 2 + (half_sums ? 2 : 4));
    weights.expand = 0;
    weights.dw = weights.chunks * kPatchChunk * Sizes::kExpandRows * 2;
    weights.project = weights.dw + weights.chunks * weights.dw_chunk;
    weights.end = weights.project + weights.chunks * kPatchChunk * Sizes::kOut * 2;
    return weights;
}

// Warp instructions, roughly: what a tile's shape is chosen by.
template <class Sizes>
constexpr int64_t patch_cost(const PatchTile& tile, int64_t height_out, int64_t chunks) {
    const int64_t rows = ceil_div(height_out, Sizes::kRows);
    int64_t cost = 0;
    for (int64_t first = 0; first < rows; first += tile.patch_rows) {
        const int64_t here = std::min<int64_t>(tile.patch_rows, rows - first);
        const int64_t warps = ceil_div(here * tile.patch_cols, kPatchesPerWarp);
        cost += warps * chunks * Sizes::kPixels * 40 + tile.rows * tile.cols * Sizes::kIn / 8;
    }
    return cost * tile.tile_cols;
}

// The shape of the tiles for an image, whatever the batch.
template <class Sizes>
constexpr PatchTile best_patch_tile(const BlockSizes& sizes, int weight_bytes) {
    const int64_t cols = ceil_div(sizes.W_out, Sizes::kCols);
    const int64_t chunks = ceil_div(sizes.hidden_channels, kPatchChunk);
    PatchTile best{};
    int64_t best_cost = INT64_MAX;
    for (int patch_cols = 1; patch_cols <= kPatchWarps * kPatchesPerWarp; patch_cols++) {
        if (patch_cols > cols) break;
        const int patch_rows = kPatchWarps * kPatchesPerWarp / patch_cols;
        const PatchTile tile = patch_tile<Sizes>(patch_cols, patch_rows, sizes.H_out, sizes.W_out);
        if (weight_bytes + tile.x_elements * 2 > kSharedBytes) continue;
        const int64_t cost = patch_cost<Sizes>(tile, sizes.H_out, chunks);
        if (cost < best_cost) best = tile, best_cost = cost;
    }
    return best;
}

// Calls `use` with the PatchSizes of the instance for a block, if there is one. Few patches are
// small ones, so that there are more of them; the order of all sums is the same.
template <bool HalfSums, bool Few, class Use>
constexpr void with_patch_sizes(const BlockSizes& sizes, Use&& use) {
    // Sums in float take the registers of half the pixels.
    constexpr int rows = HalfSums && !Few ? 4 : 2, cols = Few ? 2 : 4;
    const int64_t in = sizes.in_channels, out = sizes.out_channels;
    if (in > 32 || out > 32) return;
    if (sizes.stride == 1)
        in <= 24 && out <= 24 ? use(PatchSizes<24, 24, 1, rows, cols>{})
                              : use(PatchSizes<32, 32, 1, rows, cols>{});
    else if (in <= 16 && out <= 24)
        use(PatchSizes<16, 24, 2, 2, cols>{});
    else
        in <= 24 ? use(PatchSizes<24, 32, 2, 2, 2>{}) : use(PatchSizes<32, 32, 2, 2, 2>{});
}

// Whether this kernel is the one for the block. Narrow images leave most of a warp's patches empty.
inline bool patch_takes(const BlockSizes& sizes, Element element) {
    if (element == Element::single || !sizes.expansion) return false;
    if (sizes.kernel_size != 3 || sizes.dilation != 1) return false;
    if (sizes.in_channels % 8 || sizes.hidden_channels % 8 || sizes.out_channels % 8) return false;
    if (sizes.clip_expand.lower != 0 || sizes.clip_dw.lower != 0) return false;
    if (sizes.H_out < 20 || sizes.W_out < 20) return false;
    bool fits = false;
    const auto check = [&](auto instance, bool half) {
        using Sizes = decltype(instance);
        const int weight_bytes = patch_weights<Sizes>(sizes.hidden_channels, half).end;
        fits = best_patch_tile<Sizes>(sizes, weight_bytes).patch_cols > 0;
    };
    if (half_sums(sizes, element))
        with_patch_sizes<true, false>(sizes, [&](auto instance) { check(instance, true); });
    else
        with_patch_sizes<false, false>(sizes, [&](auto instance) { check(instance, false); });
    return fits;
}

}  // namespace mnv2::cuda
