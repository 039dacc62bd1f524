// Gradients of the block, the expanded tensor recomputed a tile at a time. No torch.
#pragma once
#include <cstdint>

#include "../block.h"
#include "sizes.h"

namespace mnv2::cpu {

// Means of channels and sums of squared deviations from them.
struct Moments {
    double *mean, *squares;
};

// Adds the moments of `count` pixels to those of `before` (Chan, Golub, LeVeque: Updating formulae
// and a pairwise algorithm for computing sample variances, 1979).
void merge_moments(Moments more, int64_t channels, double count, double before, Moments moments);

// A batch norm that uses the statistics of the batch, after the expansion or the depthwise. The
// weights and the bias before it give what is normalised already, v, and the clip after it is
// applied to z = gamma * v + beta. The gradient of v needs sums over the whole batch first.
struct LiveNorm {
    const float *gamma, *beta;  // (hidden_channels,)
    double* sums;               // (2, hidden_channels): of the gradient of z, of that times v
    double pixels;              // of the batch: N * H * W, or N * H_out * W_out
};

// Where all images go through together the sums are there in time; otherwise two calls share the
// work, and the expansion has no live norm.
enum class Pass { together, sums, gradients };

// A float32 block with its weights and the gradient of what its projection gives; its clip_project
// and residual are the caller's. Where the block has no expansion, w_expand is nullptr.
struct BackwardArgs : BlockArgs {
    // In the place of w_expand and w_project, unless they are nullptr: those of the convolutions,
    // (hidden_channels, in_channels) and (out_channels, hidden_channels), each row times its scale.
    // Their gradients are laid out like these then, without the scale, and are overwritten where
    // the whole batch goes through together.
    const float *conv_expand, *conv_project;
    const float *scale_expand, *scale_project;
    const float* x;       // (N, H, W, in_channels)
    const float* grad_y;  // (N, H_out, W_out, out_channels)
    // nullptr: there is none, or it is folded.
    const LiveNorm *norm_expand, *norm_dw;
    Pass pass;
    // Where this is not nullptr, a call only writes the moments of the depthwise result over its
    // images, and needs no grad_y.
    const Moments* moments;
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
    int64_t groups;    // of chunks: each has a sum for grad_x, and these are added up in order
    int64_t rows;      // output rows of a band
    int64_t images;    // that go through together: 1 where an image has several bands
    bool whole_batch;  // all of them, at any number of tasks
    // Of the scratch: input rows (expansion and its gradient), output rows of the gradient.
    int64_t in_rows, grad_rows;
};

// The gradient of an input row needs the gradients of this many output rows above its band too.
constexpr int64_t rows_kept(const BlockSizes& sizes) { return extent(sizes) / sizes.stride; }

BackwardSchedule choose_backward_schedule(const BlockSizes& sizes, int64_t lanes);

// The same for batch norms that use the statistics of the batch: all images go through together
// where a chunk of them fits the cache, so that nothing is computed twice.
BackwardSchedule choose_training_schedule(const BlockSizes& sizes, int64_t lanes);

// Floats of one thread's scratch.
int64_t backward_scratch(const BlockSizes& sizes, const BackwardSchedule& schedule,
                         bool of_convolutions = false);

// Tasks of one call that share nothing but what they read: `images` ranges of images, and for each
// either one task of all groups (`hidden` is 1) or one of every group. All but the first range of
// images have weight gradients of their own, all but the first range of groups a gradient of x,
// which are added up in order.
struct BackwardSplit {
    int64_t images, hidden;
};

BackwardSplit choose_backward_split(const BlockSizes& sizes, const BackwardSchedule& schedule);

// The same of a call that only writes moments: chunks are split first, since they share nothing.
BackwardSplit choose_moments_split(const BlockSizes& sizes, const BackwardSchedule& schedule);

// Images [image_begin, image_end) of groups [group_begin, group_end). `sum_of_x` has room for the
// gradient of these images' x; it is only used for more than one group of a block with expansion.
using BackwardFn = void (*)(const BackwardArgs&, const BackwardSchedule&, const Gradients&,
                            int64_t image_begin, int64_t image_end, int64_t group_begin,
                            int64_t group_end, float* sum_of_x, float* scratch);

// The same norm in the forward pass. The weights before it are as they are, and its statistics are
// written: the mean and the biased variance of what they give.
struct ForwardNorm {
    const float *gamma, *beta;
    double eps;
    double *mean, *var;
};

// What the projection gives of some groups of chunks, for a schedule of the whole batch and the
// weights of convolutions, without the projection's bias. Overwrites `projected` (N, H_out, W_out,
// out_channels); nullptr in the place of a norm: there is none, or it is folded.
using TrainingForwardFn = void (*)(const BackwardArgs&, const BackwardSchedule&,
                                   const ForwardNorm* norm_expand, const ForwardNorm* norm_dw,
                                   int64_t group_begin, int64_t group_end, float* projected,
                                   float* scratch);

// The folded weight (columns, rows) of a convolution's weight (rows, columns).
using FoldFn = void (*)(const float* weight, const double* scale, int64_t rows, int64_t columns,
                        float* folded);

// What batch norms over whole batches need, of rows of `channels` numbers, one a pixel. `before` is
// the number of pixels that are in `moments` already.
using AddMomentsFn = void (*)(const float* rows, int64_t pixels, int64_t channels, int64_t before,
                              Moments moments);

// covariance (channels, channels) += the sum of d' d, d being a row less `mean`. The scratch has
// room for `covariance_scratch` floats.
using AddCovarianceFn = void (*)(const float* rows, int64_t pixels, int64_t channels,
                                 const float* mean, double* covariance, float* scratch);

// A vector of every channel.
struct Affine {
    const float *mean, *scale, *shift;
};

// out = (rows - mean) * scale + shift, then + residual unless that is nullptr.
using NormalizeFn = void (*)(const float* rows, int64_t pixels, int64_t channels, Affine affine,
                             const float* residual, float* out);

// sums (2, channels) += the gradient, and the gradient times (row - mean).
using AddNormSumsFn = void (*)(const float* gradient, const float* rows, int64_t pixels,
                               int64_t channels, const float* mean, double* sums);

// out = gradient * factor - ((rows - mean) * scale + shift).
using NormGradientFn = void (*)(const float* gradient, const float* rows, int64_t pixels,
                                int64_t channels, const float* factor, Affine affine, float* out);

// out (pixels, columns) += (rows - mean) weight + bias, then + residual unless that is nullptr; the
// weight is (channels, columns). The scratch is that of a covariance.
struct CentredProduct {
    const float *rows, *mean, *weight, *bias, *residual;
    int64_t pixels, channels, columns;
    float *out, *scratch;
};
using AddCentredProductFn = void (*)(const CentredProduct& product);

// out (rows, columns) = a (rows, depth) b (depth, columns), and the same with a (depth, rows).
using MultiplyFn = void (*)(const float* a, const float* b, int64_t rows, int64_t depth,
                            int64_t columns, float* out);

// Pixels that are centred at once.
constexpr int64_t kCentredPixels = 256;

constexpr int64_t covariance_scratch(int64_t channels) {
    return kCentredPixels * channels + channels * channels;
}

// gradient (rows, columns), times the scale of its row; of_scale[row] becomes the sum of what it
// was times the weight.
using ScaleRowsFn = void (*)(float* gradient, const float* weight, const double* scale,
                             int64_t rows, int64_t columns, double* of_scale);

// The same for every instruction set, by the name of its row in kernels.h.
struct BackwardKernel {
    const char* name;
    BackwardFn run;
    FoldFn fold;
    ScaleRowsFn scale_rows;
    TrainingForwardFn train;
    AddMomentsFn add_moments;
    AddCovarianceFn add_covariance;
    NormalizeFn normalize;
    AddNormSumsFn add_norm_sums;
    NormGradientFn norm_gradient;
    AddCentredProductFn add_centred_product;
    MultiplyFn multiply, multiply_transposed;
};

const BackwardKernel& select_backward_kernel(const char* name);

#if defined(__x86_64__)
extern const BackwardKernel kAvx512Backward, kAvx2Backward;
#endif
extern const BackwardKernel kGenericBackward;

}  // namespace mnv2::cpu
