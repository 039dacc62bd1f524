// One call of the op on a GPU as plain data. No torch, and nothing of CUDA's.
#pragma once
#include <cstdint>

#include "../block.h"

namespace mnv2::cuda {

// What a launch needs to know of the GPU.
struct Device {
    int multiprocessors;
    int shared_bytes;  // of shared memory that one block of threads can have
    int capability;    // 80, 90, ...
};

// w_expand is nullptr where there is no expansion; a bias that is nullptr counts as zeros. Every
// pointer is aligned to 16 bytes.
struct Call : BlockSizes {
    Element element;
    const void *x, *w_expand, *w_dw, *w_project;
    const float *b_expand, *b_dw, *b_project;
    void* y;
};

}  // namespace mnv2::cuda
