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

// x and y are dense and apart, args.N images each. A thread needs scratch_layout().total floats.
// The same bits at any number of threads.
void run_block(const Kernel& kernel, const BlockStep& block, const void* x, void* y,
               const Scratch& scratch, const Threads& threads);

}  // namespace mnv2::cpu
