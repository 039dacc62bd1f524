// Gradients of the block, the expanded tensor recomputed a tile at a time. No torch.
#pragma once
#include <cstdint>

#include "../block.h"
#include "sizes.h"

namespace mnv2::cpu {

// A float32 block with its weights and the gradient of what its projection gives; its clip_project
// and residual are the caller's. Where the block has no expansion, w_expand is nullptr.
struct BackwardArgs : BlockArgs {
    const float* x;       // (N, H, W, in_channels)
    const float* grad_y;  // (N, H_out, W_out, out_channels)
};

// Where gradients go; nullptr: not needed. Those of weights and biases are laid out like these and
// are added to what is there. That of x is overwritten.
struct Gradients {
    float *x, *w_expand, *b_expand, *w_dw, *b_dw, *w_project;
};

// How a call is cut: chunks of hidden channels, and bands of output rows or some whole images. All
// but the number of images depends on the sizes of one image alone, as the order of every sum over
// one does.
struct BackwardSchedule {
    int64_t chunk;  // hidden channels, a multiple of the lanes
    int64_t chunks;
    int64_t groups;  // of chunks: each has a sum for grad_x, and these are added up in order
    int64_t rows;    // output rows of a band
    int64_t images;  // that go through together: 1 where an image has several bands
    // Of the scratch: input rows (expansion and its gradient), output rows of the gradient.
    int64_t in_rows, grad_rows;
};

// The gradient of an input row needs the gradients of this many output rows above its band too.
constexpr int64_t rows_kept(const BlockSizes& sizes) { return extent(sizes) / sizes.stride; }

BackwardSchedule choose_backward_schedule(const BlockSizes& sizes, int64_t lanes);

// Floats of one thread's scratch.
int64_t backward_scratch(const BlockSizes& sizes, const BackwardSchedule& schedule);

// Tasks of one call that share nothing but what they read: `images` ranges of images, and for each
// either one task of all groups (`hidden` is 1) or one of every group. All but the first range of
// images have weight gradients of their own, all but the first range of groups a gradient of x,
// which are added up in order.
struct BackwardSplit {
    int64_t images, hidden;
};

BackwardSplit choose_backward_split(const BlockSizes& sizes, const BackwardSchedule& schedule);

// Images [image_begin, image_end) of groups [group_begin, group_end). `sum_of_x` has room for the
// gradient of these images' x; it is only used for more than one group of a block with expansion.
using BackwardFn = void (*)(const BackwardArgs&, const BackwardSchedule&, const Gradients&,
                            int64_t image_begin, int64_t image_end, int64_t group_begin,
                            int64_t group_end, float* sum_of_x, float* scratch);

// The folded weight (columns, rows) of a convolution's weight (rows, columns).
using FoldFn = void (*)(const float* weight, const double* scale, int64_t rows, int64_t columns,
                        float* folded);

// Gradients of that weight and of the scales, from the folded weight's; nullptr: not wanted.
using UnfoldFn = void (*)(const float* gradient, const float* weight, const double* scale,
                          int64_t rows, int64_t columns, float* of_weight, double* of_scale);

// The same for every instruction set, by the name of its row in kernels.h.
struct BackwardKernel {
    const char* name;
    BackwardFn run;
    FoldFn fold;
    UnfoldFn unfold;
};

const BackwardKernel& select_backward_kernel(const char* name);

#if defined(__x86_64__)
extern const BackwardKernel kAvx512Backward, kAvx2Backward;
#endif
extern const BackwardKernel kGenericBackward;

}  // namespace mnv2::cpu
