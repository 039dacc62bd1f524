// How the CPU kernel walks through one block: a pure function of the block's sizes. No torch.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "../block.h"

namespace mnv2::cpu {

// Upper bound of a thread's scratch; 16-bit blocks pass it where the weights of 16 hidden channels
// are a quarter of it or more (thousands of channels; of a dense convolution, hundreds).
constexpr int64_t kScratchBytes = 256 * 1024;
constexpr int64_t kNetworkScratchBytes = 1024 * 1024;  // the same in a network
constexpr int64_t kMaxRowsPerStep = 8;
constexpr int64_t kMaxWindow = (kMaxRowsPerStep - 1) * 2 + kMaxExtent + 1;  // at stride 2

struct Schedule {
    // Rows outside: all hidden channels of a few rows, then the next rows. x and y come from memory
    // once, but for the margins of strips; the expanded rows in flight of every chunk are kept.
    // Chunks outside: all rows of one chunk of hidden channels, then the next chunk. Each weight
    // is touched once; y is summed up chunk by chunk.
    bool rows_outside;
    int64_t hidden_chunk;   // hidden channels at a time, a multiple of the lanes
    int64_t rows_per_step;  // output rows between two loads of the chunk's weights
    // Output columns of a strip: fewer than all where the rows in flight of a large image would not
    // fit the scratch.
    int64_t strip_cols;
    // Output rows that are summed up in scratch at a time where chunks are outside and y is not
    // float32, or may be x behind a gate; otherwise all, since y holds the sums.
    int64_t band_rows;
    // Parts of the hidden channels whose sums are kept apart and added at the end, so that threads
    // can share one small image. Depends on the block alone: the result is the same bits at any
    // number of threads.
    int64_t hidden_groups;
};

// Row windows of the sliding ring of expanded rows.
struct Ring {
    int64_t window;    // input rows that one step reads
    int64_t new_rows;  // input rows that the next step adds
    int64_t slots;     // rows of memory: the window if one step covers the image, otherwise a
                       // multiple of new_rows, so that no addition wraps around
};

Ring ring_of(const BlockArgs& args, int64_t rows_per_step);

// Where the pieces of a thread's scratch start, in floats; every piece is 64-byte aligned.
struct ScratchLayout {
    int64_t chunk_weights;  // depthwise taps and the biases of a chunk, tail lanes zero
    int64_t chunk_weights_stride;
    int64_t ring;  // expanded rows in flight
    int64_t ring_stride;
    int64_t depthwise;  // depthwise rows of one step
    // Where x and y are not float32: the weights of a chunk as floats or pairs, input rows as
    // floats, sums before they are rounded. Of a dense convolution the weights of one row of the
    // window.
    int64_t expand_panel;
    int64_t project_panel;
    // Of float32, the last columns of the projection's weight, two rows interleaved.
    int64_t interleaved;
    int64_t panels_stride;
    int64_t x_rows;
    int64_t sums;
    // Partial sums of one image by the second hidden group; where y is not float32, the first
    // group's follow.
    int64_t partial;
    int64_t total;
};

// Hidden channels [begin, end) of a group; whole vectors in all groups but the last.
std::pair<int64_t, int64_t> hidden_range(const BlockArgs& args, const Schedule& schedule,
                                         int64_t lanes, int64_t group);

// The block has no expansion, and its depthwise reads x itself.
bool reads_x_in_place(const BlockArgs& args, int64_t lanes);

// Input rows are copied as floats, of a dense convolution with its padding.
bool copies_x(const BlockArgs& args);

// What is kept of an image between the two parts of a block with a gate, in floats: the depthwise
// result from 0 on, its sums by steps, their means, and the results of the gate's two layers.
struct GateLayout {
    int64_t sums, means, squeezed, gate;
    int64_t total;  // 0 without a gate
};
GateLayout gate_layout(const BlockArgs& args, const Schedule& schedule, int64_t lanes);

// How many of the last columns of a matrix are multiplied faster with two rows interleaved: 24 or
// 40 where half a vector would be idle otherwise, and all of 8 or 16, whose rows are a vector at
// most. 0 where vectors are short.
int64_t interleaved_columns(int64_t columns, int64_t lanes);

ScratchLayout scratch_layout(const BlockArgs& args, const Schedule& schedule, int64_t lanes);
Schedule choose_schedule(const BlockArgs& args, int64_t lanes);
// In a network, where a block that goes through the image once can take the rows of the one before
// it as they come, or overwrite its input: also where rows outside are not the fastest by itself.
Schedule choose_network_schedule(const BlockArgs& args, int64_t lanes);

// Of a block with a gate: whether it multiplies the projection's weights, and otherwise the kept
// rows, by whatever there are fewer of. For all threads alike: the products are rounded
// differently.
bool gates_weights(const BlockArgs& args);

// Of a block with a gate: whether its first part goes through the image row by row.
bool keeps_row_by_row(const BlockArgs& args, const Schedule& schedule);
std::string to_string(const BlockArgs& args, const Schedule& schedule, int64_t lanes);

}  // namespace mnv2::cpu
