// One call of the op as plain data: what every kernel gets, whatever device it runs on. No torch.
#pragma once
#include <cstdint>

namespace mnv2 {

constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

struct Clip {
    float lower, upper;
};

// What activations and weights are stored as; biases are float32.
enum class Element { half, bfloat16, single };

constexpr int64_t size_of(Element element) { return element == Element::single ? 4 : 2; }

// What a call computes. Activations are NHWC, in every weight the output channels are innermost
// (mnv2_kernels/block/fold.py):
//   x (N, H, W, in_channels)               y (N, H_out, W_out, out_channels)
//   w_expand (in_channels, hidden_channels), not there where the block has no expansion (t = 1)
//   w_dw (kernel_size, kernel_size, hidden_channels)   w_project (hidden_channels, out_channels)
struct BlockSizes {
    int64_t N, H, W, H_out, W_out;
    int64_t in_channels, hidden_channels, out_channels;
    int64_t kernel_size, stride, dilation;
    int64_t pad_top, pad_left;
    Clip clip_expand, clip_dw, clip_project;
    bool expansion, residual;
};

// A block with its weights on the CPU. w_expand is nullptr where there is no expansion; a bias that
// is nullptr counts as zeros.
struct BlockArgs : BlockSizes {
    Element element;
    // bfloat16 numbers are multiplied two at a time (AVX512-BF16): in_channels, where there is an
    // expansion, and hidden_channels are even then.
    bool pairs;
    const void* w_expand;
    const float* b_expand;
    const void* w_dw;
    const float* b_dw;
    const void* w_project;
    const float* b_project;
};

}  // namespace mnv2
