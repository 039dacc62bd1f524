// Gradients of a block of layers, float32 on the CPU, each batch norm with the statistics of the
// batch or with its own: nothing of hidden channels x pixels is ever whole.
//
// What the norm of the expansion adds to the gradients is linear in x where it uses the statistics
// of the batch, with s = gamma1 / sqrt(var1 + eps):
//
//   gW1 = s (G - b m' - g W1 C / sqrt(var1 + eps))
//   gx = q - W1' (s b / M) - K (x - m),   K = W1' diag(s g / (M sqrt(var1 + eps))) W1
//
// m, C: mean and covariance of x; M: pixels of the batch; G, b, q: gradients of weight, bias and x
// of the expansion as if folded with constant statistics; g: that of gamma1, which follows from G
// and b.
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "trained_block.h"

namespace mnv2::cpu {

namespace {

using NeedsGrad = std::array<bool, 1 + kStages * kOfStage>;

// Gradients of a norm's affine, and of what it normalises.
struct OfProjection {
    at::Tensor projected;
    Numbers gamma, beta;
};

OfProjection through_norm(const at::Tensor& grad_y, const at::Tensor& projected, const Stage& stage,
                          double eps) {
    const Rows gradient(grad_y), rows(projected);
    const int64_t channels = rows.channels;
    const auto pixels = static_cast<double>(rows.pixels);
    const Norm norm(stage, eps);
    const std::vector<float> mean = rounded(numbers(stage[kMean], channels, 0));
    const Numbers sums = rows.sums(2 * channels, [&](int64_t first, int64_t count, double* part) {
        backward_kernel().add_norm_sums(gradient.begin + first * channels,
                                        rows.begin + first * channels, count, channels, mean.data(),
                                        part);
    });
    OfProjection found{like(projected), Numbers(channels), Numbers(channels)};
    Numbers scale(channels), shift(channels);
    for (int64_t i = 0; i < channels; i++) {
        found.beta[i] = sums[i];
        found.gamma[i] = sums[channels + i] * norm.inverse[i];
        shift[i] = norm.scale[i] * found.beta[i] / pixels;
        scale[i] = norm.scale[i] * norm.inverse[i] * found.gamma[i] / pixels;
    }
    const std::vector<float> factor = rounded(norm.scale), times = rounded(scale),
                             plus = rounded(shift);
    rows.each_part([&](int64_t, int64_t first, int64_t count) {
        const int64_t at = first * channels;
        backward_kernel().norm_gradient(gradient.begin + at, rows.begin + at, count, channels,
                                        factor.data(), {mean.data(), times.data(), plus.data()},
                                        data(found.projected) + at);
    });
    return found;
}

// What the norm of the expansion adds to the gradients, once those of a folded one are known.
struct ExpansionNorm {
    const Stage& stage;
    const at::Tensor &x, &x_mean, &x_covariance;
    int64_t hidden, channels;
    Norm norm;
    Numbers of_gamma, of_beta;  // gradients

    ExpansionNorm(const Stage& stage, double eps, const at::Tensor& x, const at::Tensor& x_mean,
                  const at::Tensor& x_covariance, Numbers of_scale, Numbers of_bias)
        : stage(stage),
          x(x),
          x_mean(x_mean),
          x_covariance(x_covariance),
          hidden(stage[kWeight].size(0)),
          channels(stage[kWeight].size(1)),
          norm(stage, eps),
          of_gamma(std::move(of_scale)),
          of_beta(std::move(of_bias)) {
        const Numbers bias = numbers(stage[kBias], hidden, 0);
        const Numbers mean = numbers(stage[kMean], hidden, 0);
        for (int64_t i = 0; i < hidden; i++)
            of_gamma[i] = (of_gamma[i] + of_beta[i] * (bias[i] - mean[i])) * norm.inverse[i];
    }

    // gW1: G times the scale is there.
    void add_to_weight(const at::Tensor& gradient) const {
        const at::Tensor product = weight_times(stage[kWeight], x_covariance);
        const auto *t = product.const_data_ptr<float>(), *mean = x_mean.const_data_ptr<float>();
        float* g = data(gradient);
        for (int64_t i = 0; i < hidden; i++) {
            const auto of_mean = static_cast<float>(norm.scale[i] * of_beta[i]);
            const auto of_product =
                static_cast<float>(norm.scale[i] * norm.inverse[i] * of_gamma[i]);
            for (int64_t j = 0; j < channels; j++, g++, t++)
                *g -= of_mean * mean[j] + of_product * *t;
        }
    }

    // gx: q is there. Adds grad_y too, where there is a residual.
    void add_to_x(const at::Tensor& gradient, const float* grad_y) const {
        const Rows rows(x);
        const auto pixels = static_cast<double>(rows.pixels);
        const at::Tensor scaled = floats({hidden, channels}), matrix = floats({channels, channels});
        const float* w = stage[kWeight].const_data_ptr<float>();
        float* s = data(scaled);
        Numbers constant(channels, 0);
        for (int64_t i = 0; i < hidden; i++) {
            const auto factor =
                static_cast<float>(-norm.scale[i] * norm.inverse[i] * of_gamma[i] / pixels);
            const double share = norm.scale[i] * of_beta[i] / pixels;
            for (int64_t j = 0; j < channels; j++, w++, s++) {
                *s = *w * factor;
                constant[j] -= static_cast<double>(*w) * share;
            }
        }
        backward_kernel().multiply_transposed(data(scaled), stage[kWeight].const_data_ptr<float>(),
                                              channels, hidden, channels, data(matrix));
        const std::vector<float> bias = rounded(constant);
        rows.each_part([&](int64_t, int64_t first, int64_t count) {
            const int64_t at = first * channels;
            std::vector<float> scratch(covariance_scratch(channels));
            backward_kernel().add_centred_product(
                {rows.begin + at, x_mean.const_data_ptr<float>(), data(matrix), bias.data(),
                 grad_y == nullptr ? nullptr : grad_y + at, count, channels, channels,
                 data(gradient) + at, scratch.data()});
        });
    }
};

// What a live norm computes with in a backward pass, and the gradients that it finds.
struct OfNorm {
    std::vector<float> gamma, beta;
    // The kernel adds to them.
    mutable Numbers sums;
    LiveNorm norm;

    OfNorm(const Stage& stage, int64_t channels, int64_t pixels)
        : gamma(rounded(numbers(stage[kGamma], channels, 1))),
          beta(rounded(numbers(stage[kBeta], channels, 0))),
          sums(2 * channels, 0),
          norm{gamma.data(), beta.data(), sums.data(), static_cast<double>(pixels)} {}

    Numbers of_beta() const { return {sums.begin(), sums.begin() + sums.size() / 2}; }
    Numbers of_gamma() const { return {sums.begin() + sums.size() / 2, sums.end()}; }
};

// Gradients, as far as they are needed, of x and of the layers. `saved`: what the forward pass gave
// after y; the layers have its statistics in the place of theirs.
Tensors train_backward(const at::Tensor& grad_y_given, const at::Tensor& x_given,
                       const c10::List<OptionalTensor>& layers, const at::TensorList saved,
                       at::ArrayRef<double> eps, Live live, int64_t stride, at::IntArrayRef padding,
                       int64_t dilation, bool residual, at::ArrayRef<double> clip_expand,
                       at::ArrayRef<double> clip_dw, NeedsGrad needs_grad) {
    const bool is_any_live = std::any_of(live.begin(), live.end(), [](bool l) { return l; });
    TORCH_CHECK_VALUE(saved.size() == (is_any_live ? 3 : 0),
                      "inverted_residual: the projection, and mean and covariance of x, are saved "
                      "where a norm is live, got ",
                      saved.size(), " tensors");
    TrainedBlock block(layers, eps, live, stride, padding, dilation, clip_expand, clip_dw);
    const at::Tensor x = channels_last(x_given), grad_y = channels_last(grad_y_given);
    const auto needs = [&](InStages stage, OfStage tensor) {
        return needs_grad[1 + stage * kOfStage + tensor];
    };
    const auto needs_any = [&](InStages stage) {
        const bool* const of_stage = &needs_grad[1 + stage * kOfStage];
        return std::any_of(of_stage, of_stage + kOfStage, [](bool n) { return n; });
    };
    block.fold(kExpand, block.stages[kExpand]);
    block.fold(kProject, block.as_it_is(kProject));
    const Stage& depthwise = block.stages[kDepthwise];
    block.fold(kDepthwise, live[kDepthwise] ? without_affine(depthwise) : depthwise);
    const auto choose = is_any_live ? choose_training_schedule : choose_backward_schedule;
    const BackwardSchedule schedule = choose(block.call(x).args, kernel().lanes);
    const bool is_expand_live = block.is_live(kExpand);
    // Otherwise what a live norm of the expansion adds follows from the covariance of x.
    const bool is_norm_expand = is_expand_live && schedule.whole_batch;
    if (is_norm_expand) block.fold(kExpand, without_affine(block.stages[kExpand]));

    BackwardCall call = block.call(x);
    OfProjection of_projection{grad_y, {}, {}};
    if (live[kProject])
        of_projection = through_norm(grad_y, saved[0], block.stages[kProject], eps[kProject]);
    call.set_grad_y(of_projection.projected);

    const int64_t hidden = call.args.hidden_channels;
    const OfNorm norm_expand(block.stages[kExpand], hidden,
                             call.args.N * call.args.H * call.args.W);
    const OfNorm norm_dw(depthwise, hidden, call.args.N * call.args.H_out * call.args.W_out);
    if (is_norm_expand) call.args.norm_expand = &norm_expand.norm;
    if (live[kDepthwise]) call.args.norm_dw = &norm_dw.norm;
    // A live norm of the expansion hands its gradient on to x through the sums of all of these.
    const bool through_expand =
        block.expands() && (needs_any(kExpand) || (is_expand_live && needs_grad[0]));
    const bool needs_dw = needs_any(kDepthwise);
    const Tensors gradients =
        call.gradients(schedule, {needs_grad[0], through_expand, through_expand && !is_norm_expand,
                                  needs_dw, needs_dw && !live[kDepthwise], needs_any(kProject)});

    size_t next = 0;
    const auto take = [&](bool is_there) { return is_there ? gradients[next++] : at::Tensor(); };
    const at::Tensor of_x = take(needs_grad[0]);
    const at::Tensor of_w_expand = take(through_expand);
    const at::Tensor of_b_expand = take(through_expand && !is_norm_expand);
    // (k, k, C) -> (C, 1, k, k)
    const at::Tensor of_w_dw = needs_dw ? take(true).permute({2, 0, 1}).contiguous() : at::Tensor();
    const at::Tensor of_b_dw = take(needs_dw && !live[kDepthwise]);
    const at::Tensor of_w_project = take(needs_any(kProject));

    Tensors found;
    const auto add = [&](InStages stage, OfStage which, const Numbers& gradient) {
        if (needs(stage, which))
            found.push_back(vector_of(gradient, block.stages[stage][which].scalar_type()));
    };
    // Of a live norm: the convolution's bias is taken away again by the mean.
    const auto add_live = [&](InStages stage, const Stage& folded_as, const at::Tensor& of_weight,
                              const Numbers& of_gamma, const Numbers& of_beta) {
        const bool only_weight[kOfStage] = {needs(stage, kWeight)};
        unfold(folded_as, eps[stage], only_weight, of_weight, at::Tensor(), found);
        const Stage& own = block.stages[stage];
        add(stage, kBias, Numbers(own[kWeight].size(0), 0));
        add(stage, kGamma, of_gamma), add(stage, kBeta, of_beta);
    };
    const auto add_frozen = [&](InStages stage, const at::Tensor& of_weight,
                                const at::Tensor& of_bias) {
        unfold(block.stages[stage], eps[stage], &needs_grad[1 + stage * kOfStage], of_weight,
               of_bias, found);
    };

    const float* const added = residual ? grad_y.const_data_ptr<float>() : nullptr;
    if (needs_grad[0]) found.push_back(of_x);
    if (is_norm_expand) {
        add_live(kExpand, without_affine(block.stages[kExpand]), of_w_expand,
                 norm_expand.of_gamma(), norm_expand.of_beta());
    } else if (is_expand_live) {
        if (through_expand) {
            const Stage& stage = block.stages[kExpand];
            const at::Tensor of_weight = of_w_expand.view(stage[kWeight].sizes());
            const Norm scaled(stage, eps[kExpand]);
            Numbers of_scale(hidden);
            backward_kernel().scale_rows(data(of_weight), stage[kWeight].const_data_ptr<float>(),
                                         scaled.scale.data(), hidden, call.args.in_channels,
                                         of_scale.data());
            const ExpansionNorm expand(stage, eps[kExpand], x, saved[1], saved[2], of_scale,
                                       numbers(of_b_expand, hidden, 0));
            if (needs(kExpand, kWeight)) {
                expand.add_to_weight(of_weight);
                found.push_back(of_weight);
            }
            add(kExpand, kBias, Numbers(hidden, 0));
            add(kExpand, kGamma, expand.of_gamma), add(kExpand, kBeta, expand.of_beta);
            if (needs_grad[0]) expand.add_to_x(of_x, added);
        }
    } else if (block.expands()) {
        add_frozen(kExpand, of_w_expand, of_b_expand);
    }
    if (needs_grad[0] && residual && (is_norm_expand || !is_expand_live)) of_x.add_(grad_y);
    if (live[kDepthwise])
        add_live(kDepthwise, without_affine(depthwise), of_w_dw, norm_dw.of_gamma(),
                 norm_dw.of_beta());
    else
        add_frozen(kDepthwise, of_w_dw, of_b_dw);
    if (live[kProject])
        add_live(kProject, without_norm(block.stages[kProject]), of_w_project, of_projection.gamma,
                 of_projection.beta);
    else
        add_frozen(kProject, of_w_project,
                   needs_any(kProject) ? grad_y.sum(at::IntArrayRef{0, 2, 3}) : at::Tensor());
    return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) {
    m.impl("inverted_residual_training_backward_cpu", &train_backward);
}

}  // namespace mnv2::cpu
