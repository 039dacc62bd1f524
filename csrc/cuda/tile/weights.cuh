// What a warp of the tile kernel works on, and the weights of a chunk: which of them a lane has,
// and their copies to shared memory.
#pragma once
#include "../call.h"
#include "../ptx.h"
#include "plan.h"

namespace mnv2::cuda::tile {

// Lanes that copy one row of weights or one pixel of x: 128 bytes at a time.
constexpr int kCopyLanes = 8;

// What a warp works on: which slice, and which part of its pixels; the row m and the column n of
// warps that it stands in when they project. The block computes output channels from first_out on.
struct Share {
    int slice, part, m, n, first_out;
};

MNV2_DEVICE Share share(const TilePlan& plan) {
    const int warp = thread_index() / 32;
    return {warp % plan.slices, warp / plan.slices, warp % plan.warps_m, warp / plan.warps_m,
            block_index() % plan.groups * plan.group_channels};
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

// Where channel `channel` of 16 stands in the haloed tile and behind the depthwise: the channels of
// a lane are neighbours there.
MNV2_DEVICE int place_of_channel(const Call& call, int channel) {
    return call.expansion ? channel % 8 / 2 * 4 + channel % 2 + channel / 8 * 2 : channel;
}

// Where a thread's first piece of a matrix is, 16 bytes of one row: in the weights, counted in
// elements, and in shared memory. From one of the thread's pieces to the next it is `step` rows.
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

// Copies a thread's pieces of `rows` rows, which are `stride` elements and `pitch` bytes apart. Of
// each piece the first `bytes` are copied, the others are zeros. Four pieces are copied in one go,
// since every branch to a copy takes three instructions more.
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

// Rows of w_expand that do not exist.
MNV2_DEVICE void write_zero_weights(const Call& call, const TilePlan& plan, SharedAddress to) {
    for (int row = static_cast<int>(call.in_channels); row < plan.expand_rows; row++)
        for (int i = thread_index() * 16; i < plan.chunk * 2; i += block_threads() * 16)
            store_shared(to + row * plan.expand_pitch + i, make_uint4(0, 0, 0, 0));
}

}  // namespace mnv2::cuda::tile
