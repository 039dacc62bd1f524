// The position of a block of threads of the tile kernel, its tables, and its copies of x and
// weights to shared memory.
#pragma once
#include "../call.h"
#include "../ptx.h"
#include "plan.h"

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

// Lanes that copy one row of weights or one pixel of x: 128 bytes at a time.
constexpr int kCopyLanes = 8;

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

// What a warp works on: part `part` of a slice's pixels, and matrices of the projection in row m
// and column n of warps. Of the output channels the block computes those from first_out on.
struct Share {
    int slice, part, m, n, first_out;
};

MNV2_DEVICE Share share(const TilePlan& plan) {
    const int warp = thread_index() / 32;
    return {warp % plan.slices, warp / plan.slices, warp % plan.warps_m, warp / plan.warps_m,
            block_index() % plan.groups * plan.group_channels};
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
    // Of its own for each of the lanes that have different pixels.
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

// Which pixel of y is which of the tile, counted from the first image's first; -1: none.
MNV2_DEVICE void write_outputs(const Call& call, const TilePlan& plan, const Position& at,
                               SharedAddress to) {
#pragma unroll 1
    for (int pixel = thread_index(); pixel < plan.pixels; pixel += block_threads()) {
        const int line = pixel / plan.cols, image = line / plan.rows;
        const int64_t row = at.row + line % plan.rows, col = at.col + pixel % plan.cols;
        const bool there = image < at.images && row < call.H_out && col < call.W_out;
        const int64_t of_y = (image * call.H_out + row) * call.W_out + col;
        store_shared(to + pixel * 4, there ? static_cast<uint32_t>(of_y) : ~0u);
    }
}

MNV2_DEVICE int channels_of_chunk(const Call& call, const TilePlan& plan, int number) {
    return min(plan.chunk, static_cast<int>(call.hidden_channels) - number * plan.chunk);
}

// As the projection takes them, the last ones zeros.
MNV2_DEVICE int padded(int channels) { return (channels + 15) / 16 * 16; }

// Where the weights of a chunk of hidden channels are.
struct ChunkWeights {
    SharedAddress w_expand, w_project, w_dw;
};

MNV2_DEVICE ChunkWeights chunk_weights(const TilePlan& plan, SharedAddress shared, int buffer) {
    return {shared + plan.w_expand + buffer * plan.expand_bytes,
            shared + plan.w_project + buffer * plan.project_bytes,
            shared + plan.w_dw + buffer * plan.dw_bytes};
}

// The channels of a lane's two pairs, in a chunk: those that one lane has of two products of 16 x 8
// matrices, or, without expansion, four in order.
struct LaneChannels {
    int low, high;
};

MNV2_DEVICE LaneChannels lane_channels(const Call& call, int slice) {
    const int first = slice * kTileSlice, t = thread_index() % 4;
    const int low = first + (call.expansion ? 2 * t : 4 * t);
    return {low, low + (call.expansion ? 8 : 2)};
}

// Biases of a lane's channels, those of the expansion and of the depthwise.
struct ChunkBiases {
    float2 expand[2], dw[2];
};

MNV2_DEVICE float2 two_floats(const float* from) { return *reinterpret_cast<const float2*>(from); }

MNV2_DEVICE ChunkBiases load_biases(const Call& call, const TilePlan& plan, int slice, int number) {
    const LaneChannels at = lane_channels(call, slice);
    // Channels that do not exist have those of others.
    const int last = static_cast<int>(call.hidden_channels) - 2, first = number * plan.chunk;
    const int low = min(first + at.low, last), high = min(first + at.high, last);
    ChunkBiases biases{};
    if (call.b_expand != nullptr) {
        biases.expand[0] = two_floats(call.b_expand + low);
        biases.expand[1] = two_floats(call.b_expand + high);
    }
    if (call.b_dw != nullptr) {
        biases.dw[0] = two_floats(call.b_dw + low);
        biases.dw[1] = two_floats(call.b_dw + high);
    }
    return biases;
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

// Rows of w_expand that do not exist.
MNV2_DEVICE void write_zero_weights(const Call& call, const TilePlan& plan, SharedAddress to) {
    for (int row = static_cast<int>(call.in_channels); row < plan.expand_rows; row++)
        for (int i = thread_index() * 16; i < plan.chunk * 2; i += block_threads() * 16)
            store_shared(to + row * plan.expand_pitch + i, make_uint4(0, 0, 0, 0));
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

// Where channel `channel` of 16 stands in the haloed tile and behind the depthwise: the channels of
// a lane are neighbours there.
MNV2_DEVICE int place_of_channel(const Call& call, int channel) {
    return call.expansion ? channel % 8 / 2 * 4 + channel % 2 + channel / 8 * 2 : channel;
}

// Where a thread's first piece of a matrix is, 16 bytes of one row: in the weights, counted in
// elements, and in shared memory. Others are every `step` rows.
struct Piece {
    int row, step, octet, from;
    SharedAddress to;
};

// What a thread copies of a chunk's weights.
struct Copies {
    Piece expand, dw, project;
};

MNV2_DEVICE Copies copies(const Call& call, const TilePlan& plan, const Share& share) {
    const int hidden = static_cast<int>(call.hidden_channels);
    const int out = static_cast<int>(call.out_channels);
    const int lanes = plan.chunk / 8, row = thread_index() / lanes, octet = thread_index() % lanes;
    const Piece expand{row, block_threads() / lanes, octet, row * hidden + octet * 8,
                       static_cast<SharedAddress>(row * plan.expand_pitch + octet * 16)};
    Piece dw = expand;
    dw.to = row * kTileTapBytes + octet * 16;
    // Threads are a multiple of 16 times these lanes: all rows of a thread have one place in their
    // 16.
    const int rows = thread_index() / kCopyLanes, first = thread_index() % kCopyLanes;
    const int place = rows / 16 * 16 + place_of_channel(call, rows % 16);
    return {expand,
            dw,
            {rows, block_threads() / kCopyLanes, first, rows * out + share.first_out + first * 8,
             static_cast<SharedAddress>(place * plan.project_pitch + first * 16)}};
}

// Copies a thread's pieces of `rows` rows, `stride` elements and `pitch` bytes apart: the first
// `bytes` of each, then zeros. Four in one go, since a branch to a copy takes three instructions.
MNV2_DEVICE void copy_rows(const Piece& piece, const uint16_t* from, int stride, SharedAddress to,
                           int pitch, int rows, int bytes) {
    const int64_t step = static_cast<int64_t>(piece.step) * stride;
    from += piece.from, to += piece.to;
#pragma unroll 1
    for (int left = rows - piece.row; left > 0; left -= 4 * piece.step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (left > i * piece.step) copy_async(to, from, bytes);
            from += step, to += piece.step * pitch;
        }
    }
}

// What expansion and depthwise need of a chunk. Rows of w_expand that do not exist are zero for
// good.
MNV2_DEVICE void stage_expand_weights(const Call& call, const TilePlan& plan, const Copies& c,
                                      const ChunkWeights& to, int number) {
    const int first = number * plan.chunk, hidden = static_cast<int>(call.hidden_channels);
    const int channels = channels_of_chunk(call, plan, number) - c.expand.octet * 8;
    // Products and the depthwise take channels by 16.
    if (channels < 0 || (channels == 0 && c.expand.octet % 2 == 0)) return;
    const int bytes = channels > 0 ? 16 : 0;
    const int taps = static_cast<int>(call.kernel_size * call.kernel_size);
    if (call.expansion)
        copy_rows(c.expand, static_cast<const uint16_t*>(call.w_expand) + first, hidden,
                  to.w_expand, plan.expand_pitch, static_cast<int>(call.in_channels), bytes);
    copy_rows(c.dw, static_cast<const uint16_t*>(call.w_dw) + first, hidden, to.w_dw, kTileTapBytes,
              taps, bytes);
}

// The rows of w_project of `channels` hidden channels from `first` on, in the order of their
// places. Passes: pieces of a row that a thread copies, at most.
template <int Passes>
MNV2_DEVICE void stage_project_weights(const Call& call, const TilePlan& plan, const Copies& c,
                                       int first_out, int first, int channels, SharedAddress to) {
    const Piece& piece = c.project;
    const int out = static_cast<int>(call.out_channels);
    const int octets = plan.group_channels / 8, valid_octets = (out - first_out) / 8;
    const uint16_t* from =
        static_cast<const uint16_t*>(call.w_project) + (first * out + piece.from);
    to += piece.to;
#pragma unroll 1
    for (int row = piece.row; row < padded(channels); row += piece.step) {
        const int valid = row < channels ? valid_octets : 0;
#pragma unroll
        for (int pass = 0; pass < Passes; pass++) {
            const int octet = piece.octet + pass * kCopyLanes;
            if (octet < octets)
                copy_async(to + pass * kCopyLanes * 16, from + pass * kCopyLanes * 8,
                           octet < valid ? 16 : 0);
        }
        from += static_cast<int64_t>(piece.step) * out, to += piece.step * plan.project_pitch;
    }
}

}  // namespace mnv2::cuda::tile
