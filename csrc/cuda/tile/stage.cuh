// The position of a block of threads of the tile kernel, and its copies of x and weights to shared
// memory.
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

// Computed anew at each use: kept, it would take registers from the sums.
MNV2_DEVICE Position locate(const Call& call, const TilePlan& plan) {
    Position at;
    int number = opaque(block_index()) / plan.groups;
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

// Which output channels the block computes.
MNV2_DEVICE int output_group(const TilePlan& plan) { return block_index() % plan.groups; }

// Calls use(pixel, place in the haloed tile, pixel of x) for every pixel under the tile that is in
// the image: `lanes` lanes with each, a power of 2.
template <class Use>
MNV2_DEVICE void for_in_pixels(const Call& call, const TilePlan& plan, const Position& at,
                               int lanes, Use&& use) {
    const int warp = thread_index() / 32, warps = block_threads() / 32;
#pragma unroll 1
    for (int line = warp; line < at.images * at.in_rows; line += warps) {
        const int image = line / at.in_rows, row = line % at.in_rows;
        const int64_t first =
            ((at.first_image + image) * call.H + at.in_row + row) * call.W + at.in_col;
        const int place = (image * plan.in_rows + at.halo_row + row) * plan.in_cols + at.halo_col;
#pragma unroll 1
        for (int col = thread_index() % 32 / lanes; col < at.in_cols; col += 32 / lanes)
            use(line * at.in_cols + col, place + col, first + col);
    }
}

// The pixels of x under the tile, one after the other, their channels filled up to a multiple
// of 16.
MNV2_DEVICE void stage_x(const Call& call, const TilePlan& plan, const Position& at,
                         SharedAddress to) {
    const auto* x = static_cast<const uint16_t*>(call.x);
    const int octets = static_cast<int>(call.in_channels) / 8;
    for_in_pixels(call, plan, at, kCopyLanes, [&](int pixel, int, int64_t of_x) {
#pragma unroll 1
        for (int o = thread_index() % kCopyLanes; o < plan.expand_rows / 8; o += kCopyLanes)
            copy_async(to + (pixel * plan.x_pitch + o * 8) * 2,
                       x + of_x * call.in_channels + (o < octets ? o * 8 : 0), o < octets ? 16 : 0);
    });
}

// The haloed tile is zero outside the image for good.
MNV2_DEVICE void write_zeros(const TilePlan& plan, SharedAddress e) {
    const int bytes = plan.in_rows * plan.in_cols * plan.images * plan.e_pitch * 2;
#pragma unroll 1
    for (int i = thread_index() * 16; i < bytes; i += block_threads() * 16)
        store_shared(e + i, make_uint4(0, 0, 0, 0));
}

// The number of expanded pixels, then the place of each in the haloed tile.
MNV2_DEVICE void write_places(const Call& call, const TilePlan& plan, const Position& at,
                              SharedAddress to) {
    if (thread_index() == 0)
        store_shared(to, static_cast<uint32_t>(at.images * at.in_rows * at.in_cols));
    for_in_pixels(call, plan, at, 1, [&](int pixel, int place, int64_t) {
        store_shared(to + kTilePlacesHead + pixel * 2, static_cast<uint16_t>(place));
    });
}

// The jobs of the depthwise, 8 bytes each.
MNV2_DEVICE void write_jobs(const TilePlan& plan, int stride, SharedAddress to) {
    const int strips = plan.strips, segments = plan.segments, step = plan.out_step;
#pragma unroll 1
    for (int job = thread_index(); job < plan.jobs; job += block_threads()) {
        const int strip = job % strips, segment = job / strips % segments;
        const int image = job / (strips * segments);
        const int col = strip / step * step * kTileStrip + strip % step;
        const int row = segment / step * step * plan.job_rows + segment % step;
        const int left = row < plan.rows && col < plan.cols ? (plan.rows - row - 1) / step + 1 : 0;
        const uint32_t rows = min(left, plan.job_rows);
        const uint32_t second = col + step < plan.cols;
        const uint32_t place = (image * plan.in_rows + row * stride) * plan.in_cols + col * stride;
        const uint32_t pixel = (image * plan.rows + row) * plan.cols + col;
        store_shared(to + job * 8, make_uint2(place | rows << 16, pixel | second << 16));
    }
}

MNV2_DEVICE int channels_of_chunk(const Call& call, const TilePlan& plan, int number) {
    return min(plan.chunk, static_cast<int>(call.hidden_channels) - number * plan.chunk);
}

// As the projection takes them, the last ones zeros.
MNV2_DEVICE int padded_channels(const Call& call, const TilePlan& plan, int number) {
    return (channels_of_chunk(call, plan, number) + 15) / 16 * 16;
}

// A chunk of x in place of the expansion: all of the haloed tile, zeros outside the image.
MNV2_DEVICE void stage_expanded(const Call& call, const TilePlan& plan, int number,
                                SharedAddress to) {
    const Position at = locate(call, plan);
    const int lanes = plan.chunk / 8, octet = thread_index() % lanes;
    if (octet * 8 >= channels_of_chunk(call, plan, number)) return;
    const auto* x = static_cast<const uint16_t*>(call.x) + number * plan.chunk + octet * 8;
#pragma unroll 1
    for (int line = thread_index() / 32; line < plan.images * plan.in_rows;
         line += block_threads() / 32) {
        const int image = line / plan.in_rows, row = line % plan.in_rows - at.halo_row;
        const bool row_there = image < at.images && row >= 0 && row < at.in_rows;
        const int64_t first =
            ((at.first_image + image) * call.H + at.in_row + row) * call.W + at.in_col;
#pragma unroll 1
        for (int place = thread_index() % 32 / lanes; place < plan.in_cols; place += 32 / lanes) {
            const int col = place - at.halo_col;
            const bool there = row_there && col >= 0 && col < at.in_cols;
            copy_async(to + ((line * plan.in_cols + place) * plan.e_pitch + octet * 8) * 2,
                       there ? x + (first + col) * call.in_channels : x, there ? 16 : 0);
        }
    }
}

// What shared memory has for good, and without expansion the first chunk, which is number `chunk`.
MNV2_DEVICE void start_tile(const Call& call, const TilePlan& plan, SharedAddress shared,
                            int chunk) {
    if (call.expansion) {
        const Position at = locate(call, plan);
        stage_x(call, plan, at, shared + plan.x);
        write_places(call, plan, at, shared + plan.places);
        write_zeros(plan, shared + plan.e);
    } else {
        stage_expanded(call, plan, chunk, shared + plan.e);
    }
    write_jobs(plan, static_cast<int>(call.stride), shared + plan.job_table);
}

// rows x octets pieces of 16 bytes; those from valid_rows and valid_octets on are zeros.
MNV2_DEVICE void stage_matrix(const uint16_t* from, int64_t stride, SharedAddress to, int pitch,
                              int rows, int valid_rows, int octets, int valid_octets) {
    const int lane = thread_index() % kCopyLanes;
#pragma unroll 1
    for (int row = thread_index() / kCopyLanes; row < rows; row += block_threads() / kCopyLanes) {
#pragma unroll 1
        for (int o = lane; o < octets; o += kCopyLanes) {
            const bool there = row < valid_rows && o < valid_octets;
            copy_async(to + (row * pitch + o * 8) * 2, there ? from + row * stride + o * 8 : from,
                       there ? 16 : 0);
        }
    }
}

MNV2_DEVICE void stage_bias(const float* bias, int first, int channels, int chunk, SharedAddress to,
                            const void* anything) {
#pragma unroll 1
    for (int i = thread_index() * 4; i < chunk; i += block_threads() * 4) {
        const bool there = bias != nullptr && i < channels;
        copy_async(to + i * 4, there ? bias + first + i : anything, there ? 16 : 0);
    }
}

// Where the weights of a chunk of hidden channels are.
struct ChunkWeights {
    SharedAddress w_expand, w_project, w_dw, b_expand, b_dw;
};

MNV2_DEVICE ChunkWeights chunk_weights(const TilePlan& plan, SharedAddress shared, int number) {
    const int buffer = plan.buffers == 2 ? number % 2 : 0;
    const SharedAddress biases = shared + plan.biases + number % 2 * plan.bias_bytes;
    return {shared + plan.w_expand + buffer * plan.expand_bytes,
            shared + plan.w_project + buffer * plan.project_bytes,
            shared + plan.w_dw + number % 2 * plan.dw_bytes, biases, biases + plan.chunk * 4};
}

// What expansion and depthwise need of a chunk.
MNV2_DEVICE void stage_expand_weights(const Call& call, const TilePlan& plan, SharedAddress shared,
                                      int number) {
    const ChunkWeights to = chunk_weights(plan, shared, number);
    const int first = number * plan.chunk, channels = channels_of_chunk(call, plan, number);
    const int64_t hidden = call.hidden_channels;
    if (call.expansion) {
        stage_matrix(static_cast<const uint16_t*>(call.w_expand) + first, hidden, to.w_expand,
                     plan.expand_pitch, plan.expand_rows, static_cast<int>(call.in_channels),
                     plan.chunk / 8, channels / 8);
        stage_bias(call.b_expand, first, channels, plan.chunk, to.b_expand, call.x);
    }
    const int taps = static_cast<int>(call.kernel_size * call.kernel_size);
    stage_matrix(static_cast<const uint16_t*>(call.w_dw) + first, hidden, to.w_dw, plan.chunk, taps,
                 taps, channels / 8, channels / 8);
    stage_bias(call.b_dw, first, channels, plan.chunk, to.b_dw, call.x);
}

// The rows of w_project of `channels` hidden channels.
MNV2_DEVICE void stage_project_weights(const Call& call, const TilePlan& plan, int first,
                                       int channels, SharedAddress to) {
    const int out = static_cast<int>(call.out_channels);
    const int first_out = output_group(plan) * plan.group_channels;
    stage_matrix(static_cast<const uint16_t*>(call.w_project) + static_cast<int64_t>(first) * out +
                     first_out,
                 out, to, plan.project_pitch, (channels + 15) / 16 * 16, channels,
                 plan.group_channels / 8, min(plan.group_channels, out - first_out) / 8);
}

}  // namespace mnv2::cuda::tile
