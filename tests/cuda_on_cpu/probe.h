// What a probe is given, and how it touches shared memory.
#pragma once

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

namespace mnv2::cuda {

namespace {

struct Probe {
    bool broken;
    int number;
    const uint32_t* in;
    uint32_t* out;
};

MNV2_DEVICE int lane() { return thread_index() % 32; }
MNV2_DEVICE int warp() { return thread_index() / 32; }
MNV2_DEVICE SharedAddress word(int i) { return shared_memory() + i * 4; }
MNV2_DEVICE void put(int i) { store_shared<uint32_t>(word(i), 100 + i); }
MNV2_DEVICE uint32_t get(int i) { return load_shared<uint32_t>(word(i)); }

// So that what follows is never the first access.
MNV2_DEVICE void fill(int words = 2) {
    for (int i = 0; i < words; i++) put(thread_index() + i * block_threads());
    block_barrier();
}

}  // namespace

}  // namespace mnv2::cuda
