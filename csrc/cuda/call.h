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
    int cluster = 8;   // blocks of the largest cluster that it can place
};

// Shared memory that a block of threads can have on every GPU of capability 8.0 and later.
constexpr int kSharedBytes = 99 << 10;

// Sums of the depthwise in fp16: where the layers' own results are fp16 and no sum can overflow.
constexpr bool half_sums(const BlockSizes& sizes, Element element) {
    return element == Element::half && sizes.kernel_size == 3 && sizes.expansion &&
           sizes.clip_expand.lower >= -64.f && sizes.clip_expand.upper <= 64.f;
}

// w_expand is nullptr where there is no expansion; a bias that is nullptr counts as zeros. Every
// pointer is aligned to 16 bytes.
struct Call : BlockSizes {
    Element element;
    const void *x, *w_expand, *w_dw, *w_project;
    const float *b_expand, *b_dw, *b_project;
    void* y;
};

}  // namespace mnv2::cuda
