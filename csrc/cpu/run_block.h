// A block over all of its images on all threads: a call of the op, or a step of a network. No
// torch, no threads of its own.
#pragma once
#include "kernels.h"
#include "threads.h"

namespace mnv2::cpu {

struct BlockStep {
    BlockArgs args;
    Schedule schedule;
};

// x and y are dense, args.N images each, and apart; a block with a gate may write its only image
// over x, where y is x or there is no residual. A thread needs scratch_layout().total floats,
// `kept` is kept_floats() of them. The same bits at any number of threads.
void run_block(const Kernel& kernel, const BlockStep& block, const void* x, void* y,
               const Scratch& scratch, float* kept, const Threads& threads);

// A block with a gate and no residual whose first part is done row by row, of one image: tiles of
// it begin as this one, and after all of them comes the second part.
Tile tile_to_keep(const BlockStep& block, int64_t lanes, float* kept);
void finish_gated(const Kernel& kernel, const BlockStep& block, void* y, const Scratch& scratch,
                  float* kept, const Threads& threads);

// What is kept of all images that are in work at a time.
int64_t kept_floats(const BlockStep& block, int64_t lanes, int64_t threads);

}  // namespace mnv2::cpu
