// One call of the op as plain data: what every kernel gets, whatever device it runs on. No torch.
#pragma once
#include <cstdint>

namespace mnv2 {

constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

struct Clip {
    float lower, upper;
};

// What follows a layer: a clip, or a curve (mnv2_kernels/block/config.py).
enum class Curve { clip, hardswish, silu, gelu, gelu_tanh };

struct Activation {
    Curve curve;
    Clip clip;  // (-inf, inf) where it is a curve
};

// What activations and weights are stored as; biases are float32.
enum class Element { half, bfloat16, single };

constexpr int64_t size_of(Element element) { return element == Element::single ? 4 : 2; }

// What a call computes. Activations are NHWC, in every weight the output channels are innermost
// (mnv2_kernels/block/fold.py):
//   x (N, H, W, in_channels)               y (N, H_out, W_out, out_channels)
//   w_expand (in_channels, hidden_channels), not there where the block has no expansion (t = 1)
//   w_dw (kernel_size, kernel_size, hidden_channels)   w_project (hidden_channels, out_channels)
// or, where `dense`, a convolution of all channels in the place of expansion and depthwise:
//   w_dw (kernel_size, kernel_size, in_channels, hidden_channels)
struct BlockSizes {
    int64_t N, H, W, H_out, W_out;
    int64_t in_channels, hidden_channels, out_channels;
    int64_t kernel_size, stride, dilation;
    int64_t pad_top, pad_left;
    Clip clip_expand, clip_dw, clip_project;
    bool expansion, residual, dense;
};

// Rows (and columns) from the first tap of a depthwise window to the last, at most: 5 taps 36
// apart.
constexpr int64_t kMaxExtent = 144;

// Whether a kernel for the op `mbconv` takes a depthwise, or a dense convolution in its place.
constexpr bool is_known_window(int64_t kernel_size, int64_t dilation, bool dense) {
    if (dense) return (kernel_size == 1 || kernel_size == 3 || kernel_size == 5) && dilation == 1;
    const bool known = kernel_size == 3 || kernel_size == 5 || kernel_size == 7;
    return known && dilation >= 1 && dilation <= kMaxExtent / (kernel_size - 1);
}

// A squeeze-excite: channel c of the depthwise result is multiplied by
// scale(w_excite[:, c] . squeeze(w_squeeze^T . means + b_squeeze) + b_excite[c]), the means being
// those over all pixels of an image. A bias that is nullptr counts as zeros.
struct GateArgs {
    int64_t width;          // 0: there is none
    Activation squeeze;     // after the first layer
    bool hard;              // scale(x) is clip(x + 3, 0, 6) / 6, otherwise 1 / (1 + exp(-x))
    const void* w_squeeze;  // (hidden_channels, width)
    const float* b_squeeze;
    const void* w_excite;  // (width, hidden_channels)
    const float* b_excite;
};

// A block with its weights on the CPU. w_expand is nullptr where there is no expansion; a bias that
// is nullptr counts as zeros.
struct BlockArgs : BlockSizes {
    Element element;
    // In place of the clips of BlockSizes.
    Curve curve_expand, curve_dw, curve_project;
    GateArgs gate;
    // bfloat16 numbers are multiplied two at a time (AVX512-BF16): in_channels, where there is an
    // expansion, and hidden_channels are even then.
    bool pairs;
    const void* w_expand;
    const float* b_expand;
    const void* w_dw;
    const float* b_dw;
    const void* w_project;
    const float* b_project;

    Activation after_expand() const { return {curve_expand, clip_expand}; }
    Activation after_dw() const { return {curve_dw, clip_dw}; }
    Activation after_project() const { return {curve_project, clip_project}; }
};

}  // namespace mnv2
