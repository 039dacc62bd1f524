// The position of a block of threads of the tile kernel, its tables, and its copy of x to shared
// memory.
#pragma once
#include "weights.cuh"

namespace mnv2::cuda::tile {

// A clip of pairs. Rounding keeps order, so values may be rounded before they are clipped.
struct PairClip {
    Pair lower, upper;
};

struct TileCall {
    Call call;
    TilePlan plan;
    PairClip clip_expand, clip_dw;
    bool relu;  // whether both lower bounds are zero
};

struct Position {
    int64_t first_image;
    int images;
    int row, col;  // of the first output pixel
    // The part of the input under the tile that is in the image: where it begins, in the image and
    // in the tile.
    int64_t in_row, in_col;
    int halo_row, halo_col;
    int in_rows, in_cols;
};

MNV2_DEVICE Position locate(const Call& call, const TilePlan& plan) {
    Position at;
    int number = block_index() / plan.groups;
    at.col = number % plan.tile_cols * plan.cols, number /= plan.tile_cols;
    at.row = number % plan.tile_rows * plan.rows, number /= plan.tile_rows;
    at.first_image = static_cast<int64_t>(number) * plan.images;
    at.images = static_cast<int>(min(static_cast<int64_t>(plan.images), call.N - at.first_image));
    const int64_t row = at.row * call.stride - call.pad_top;
    const int64_t col = at.col * call.stride - call.pad_left;
    at.in_row = row < 0 ? 0 : row, at.in_col = col < 0 ? 0 : col;
    at.halo_row = static_cast<int>(at.in_row - row),
    at.halo_col = static_cast<int>(at.in_col - col);
    at.in_rows = static_cast<int>(min(row + plan.in_rows, call.H) - at.in_row);
    at.in_cols = static_cast<int>(min(col + plan.in_cols, call.W) - at.in_col);
    return at;
}

// Calls use(pixel, place in a slice of the haloed tile, pixel of x) for every pixel under the tile
// that is in the image: `lanes` lanes with each, a power of 2.
template <class Use>
MNV2_DEVICE void for_in_pixels(const Call& call, const TilePlan& plan, const Position& at,
                               int lanes, Use&& use) {
    const int warp = thread_index() / 32, warps = block_threads() / 32;
#pragma unroll 1
    for (int line = warp; line < at.images * at.in_rows; line += warps) {
        const int image = line / at.in_rows, row = line % at.in_rows;
        const int64_t first =
            ((at.first_image + image) * call.H + at.in_row + row) * call.W + at.in_col;
        const int place =
            (image * plan.in_rows + at.halo_row + row) * plan.e_row + at.halo_col * kTilePixelBytes;
#pragma unroll 1
        for (int col = thread_index() % 32 / lanes; col < at.in_cols; col += 32 / lanes)
            use(line * at.in_cols + col, place + col * kTilePixelBytes, first + col);
    }
}

// The pixels of x under the tile, one after the other, their channels filled up to a multiple
// of 16.
MNV2_DEVICE void stage_x(const Call& call, const TilePlan& plan, const Position& at,
                         SharedAddress to) {
    const auto* x = static_cast<const uint16_t*>(call.x);
    const int octets = static_cast<int>(call.in_channels) / 8;
    for_in_pixels(call, plan, at, kCopyLanes, [&](int pixel, int, int64_t of_x) {
        const uint16_t* const from = x + of_x * call.in_channels;
#pragma unroll 1
        for (int o = thread_index() % kCopyLanes; o < plan.expand_rows / 8; o += kCopyLanes)
            copy_async(to + pixel * plan.x_pitch + o * 16, from + (o < octets ? o * 8 : 0),
                       o < octets ? 16 : 0);
    });
}

// The haloed tile is zero outside the image for good.
MNV2_DEVICE void write_zeros(const TilePlan& plan, SharedAddress e) {
#pragma unroll 1
    for (int i = thread_index() * 16; i < plan.e_bytes; i += block_threads() * 16)
        store_shared(e + i, make_uint4(0, 0, 0, 0));
}

// The number of expanded pixels, then the place of each in the haloed tile, in units of 16 bytes.
MNV2_DEVICE void write_places(const Call& call, const TilePlan& plan, const Position& at,
                              SharedAddress to) {
    const int pixels = at.images * at.in_rows * at.in_cols;
    if (thread_index() == 0) store_shared(to, static_cast<uint32_t>(pixels));
    for_in_pixels(call, plan, at, 1, [&](int pixel, int place, int64_t) {
        store_shared(to + kTilePlacesHead + pixel * 2, static_cast<uint16_t>(place / 16));
    });
    // Pixels that fill up the last unit: lanes that expand different ones write to different
    // places.
    const int pixel = pixels + thread_index();
    if (pixel < (pixels + kTileUnitPixels - 1) / kTileUnitPixels * kTileUnitPixels)
        store_shared(to + kTilePlacesHead + pixel * 2,
                     static_cast<uint16_t>(plan.e_slice / 16 - 16 + pixel % 8 * 2));
}

// The jobs of the depthwise: where the first tap is in a slice, then how many outputs the strip has
// and where the first goes, in pixels. Rows are next to one another.
MNV2_DEVICE void write_jobs(const Call& call, const TilePlan& plan, SharedAddress to) {
    const int rows = plan.images * plan.rows, step = plan.out_step;
    const int stride = static_cast<int>(call.stride);
#pragma unroll 1
    for (int job = thread_index(); job < plan.jobs; job += block_threads()) {
        const int line = job % rows, strip = job / rows;
        const int image = line / plan.rows, row = line % plan.rows;
        const int col = strip / step * step * kTileStrip + strip % step;
        const uint32_t place =
            (image * plan.in_rows + row * stride) * plan.e_row + col * stride * kTilePixelBytes;
        const uint32_t outputs = col < plan.cols ? (plan.cols - col - 1) / step + 1 : 0;
        store_shared(to + job * 8, make_uint2(place, outputs << 16 | (line * plan.cols + col)));
    }
}

// Where in y the pixels of the tile are, counted in pixels from the first one; -1: nowhere.
MNV2_DEVICE void write_outputs(const Call& call, const TilePlan& plan, const Position& at,
                               SharedAddress to) {
#pragma unroll 1
    for (int pixel = thread_index(); pixel < plan.pixels; pixel += block_threads()) {
        const int line = pixel / plan.cols, col = pixel % plan.cols;
        const int image = line / plan.rows, row = line % plan.rows;
        const bool there =
            image < at.images && at.row + row < call.H_out && at.col + col < call.W_out;
        const int64_t of_y = (image * call.H_out + row) * call.W_out + col;
        store_shared(to + pixel * 4, there ? static_cast<uint32_t>(of_y) : ~0u);
    }
}

// A chunk of x in place of the expansion: all of the haloed tile, zeros outside the image.
MNV2_DEVICE void stage_expanded(const Call& call, const TilePlan& plan, int number,
                                SharedAddress to) {
    const Position at = locate(call, plan);
    const int lanes = plan.chunk / 8, octet = thread_index() % lanes;
    const int channels = channels_of_chunk(call, plan, number);
    if (octet * 8 >= padded(channels)) return;
    const bool exists = octet * 8 < channels;
    const auto* x =
        static_cast<const uint16_t*>(call.x) + (exists ? number * plan.chunk + octet * 8 : 0);
    to += octet / 2 * plan.e_slice + octet % 2 * 16;
    const int cols = plan.e_row / kTilePixelBytes;
#pragma unroll 1
    for (int line = thread_index() / 32; line < plan.images * plan.in_rows;
         line += block_threads() / 32) {
        const int image = line / plan.in_rows, row = line % plan.in_rows - at.halo_row;
        const bool row_there = exists && image < at.images && row >= 0 && row < at.in_rows;
        const int64_t first =
            ((at.first_image + image) * call.H + at.in_row + row) * call.W + at.in_col;
#pragma unroll 1
        for (int place = thread_index() % 32 / lanes; place < cols; place += 32 / lanes) {
            const int col = place - at.halo_col;
            const bool there = row_there && col >= 0 && col < at.in_cols;
            copy_async(to + line * plan.e_row + place * kTilePixelBytes,
                       there ? x + (first + col) * call.in_channels : x, there ? 16 : 0);
        }
    }
}

// What shared memory has for good, and without expansion the first chunk, which is number `chunk`.
MNV2_DEVICE void start_tile(const Call& call, const TilePlan& plan, SharedAddress shared,
                            int chunk) {
    const Position at = locate(call, plan);
    if (call.expansion) {
        stage_x(call, plan, at, shared + plan.x);
        write_places(call, plan, at, shared + plan.places);
        write_zeros(plan, shared + plan.e);
        for (int buffer = 0; buffer < plan.buffers; buffer++)
            write_zero_weights(call, plan, chunk_weights(plan, shared, buffer).w_expand);
    } else {
        stage_expanded(call, plan, chunk, shared + plan.e);
    }
    write_jobs(call, plan, shared + plan.job_table);
    write_outputs(call, plan, at, shared + plan.outputs);
}

}  // namespace mnv2::cuda::tile
