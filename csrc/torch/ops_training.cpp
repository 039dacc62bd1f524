// A block whose batch norms use the statistics of the batch, float32 on the CPU: forward pass and
// gradients, nothing of hidden channels x pixels ever whole.
//
// The expansion is linear, so that its batch mean and variance follow from the mean and the
// covariance of x, and what its norm adds to the gradients is linear in x too:
//
//   mean1 = W1 m   var1 = diag(W1 C W1')   s = gamma1 / sqrt(var1 + eps)
//   gW1 = s (G - b m' - g W1 C / sqrt(var1 + eps))
//   gx = q - W1' (s b / M) - K (x - m),   K = W1' diag(s g / (M sqrt(var1 + eps))) W1
//
// with m, C: mean and covariance of x; M: pixels of the batch; G, b, q: gradients of weight, bias
// and x of the expansion as if folded with constant statistics; g: that of gamma1, which follows
// from G and b.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.h"
#include "layers.h"
#include "ops_backward.h"
#include "ops_cpu.h"

namespace mnv2::cpu {

namespace {

// Ranges of pixels (or channels) that are summed apart, at any number of threads.
constexpr int64_t kParts = 8;

using Tensors = std::vector<at::Tensor>;
using Live = std::array<bool, kStages>;
using NeedsGrad = std::array<bool, 1 + kStages * kOfStage>;

enum InStages { kExpand, kDepthwise, kProject };

at::Tensor floats(at::IntArrayRef sizes) {
    return at::empty(sizes, at::TensorOptions().dtype(at::kFloat));
}

float* data(const at::Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

at::Tensor doubles_of(const Numbers& numbers) {
    const at::Tensor vector = at::empty({static_cast<int64_t>(numbers.size())}, at::kDouble);
    std::copy(numbers.begin(), numbers.end(), vector.mutable_data_ptr<double>());
    return vector;
}

std::vector<float> rounded(const Numbers& numbers) {
    std::vector<float> found(numbers.size());
    std::transform(numbers.begin(), numbers.end(), found.begin(),
                   [](double n) { return static_cast<float>(n); });
    return found;
}

// Rows of channels, one a pixel, and the sums over them.
struct Rows {
    const float* begin;
    int64_t pixels, channels;

    explicit Rows(const at::Tensor& images)
        : begin(images.const_data_ptr<float>()),
          pixels(images.size(0) * images.size(2) * images.size(3)),
          channels(images.size(1)) {}

    // run(part, first pixel, pixels) for all parts, on torch's threads.
    template <class Run>
    void each_part(const Run& run) const {
        torch_threads(kParts).run(kParts, [&](int64_t part, int64_t) {
            const int64_t first = part * pixels / kParts;
            run(part, first, (part + 1) * pixels / kParts - first);
        });
    }

    // Sums of `size` doubles; run(first pixel, pixels, sums) adds to those of a part.
    template <class Run>
    Numbers sums(int64_t size, const Run& run) const {
        Numbers parts(kParts * size, 0);
        each_part([&](int64_t part, int64_t first, int64_t count) {
            run(first, count, &parts[part * size]);
        });
        for (int64_t i = size; i < kParts * size; i++) parts[i % size] += parts[i];
        parts.resize(size);
        return parts;
    }
};

struct Statistics {
    Numbers mean, var;
};

Statistics statistics(const Rows& rows) {
    const int64_t channels = rows.channels;
    Statistics found{Numbers(channels), Numbers(channels)};
    Numbers means(kParts * channels), squares(kParts * channels);
    rows.each_part([&](int64_t part, int64_t first, int64_t count) {
        backward_kernel().add_moments(rows.begin + first * channels, count, channels, 0,
                                      {&means[part * channels], &squares[part * channels]});
    });
    int64_t before = 0;
    for (int64_t part = 0; part < kParts; part++) {
        const int64_t end = (part + 1) * rows.pixels / kParts;
        if (end == before) continue;
        merge_moments({&means[part * channels], &squares[part * channels]}, channels,
                      static_cast<double>(end - before), static_cast<double>(before),
                      {found.mean.data(), found.var.data()});
        before = end;
    }
    for (double& n : found.var) n /= static_cast<double>(rows.pixels);
    return found;
}

// (channels, channels), around the mean.
at::Tensor covariance(const Rows& rows, const float* mean) {
    const int64_t channels = rows.channels;
    const Numbers sums =
        rows.sums(channels * channels, [&](int64_t first, int64_t count, double* part) {
            std::vector<float> scratch(covariance_scratch(channels));
            backward_kernel().add_covariance(rows.begin + first * channels, count, channels, mean,
                                             part, scratch.data());
        });
    const at::Tensor found = floats({channels, channels});
    std::transform(sums.begin(), sums.end(), data(found), [&](double sum) {
        return static_cast<float>(sum / static_cast<double>(rows.pixels));
    });
    return found;
}

// W1 C: (hidden channels, channels).
at::Tensor weight_times(const at::Tensor& weight, const at::Tensor& covariance) {
    const int64_t rows = weight.size(0), depth = weight.size(1);
    const at::Tensor found = floats({rows, depth});
    torch_threads(kParts).run(kParts, [&](int64_t part, int64_t) {
        const int64_t first = part * rows / kParts, end = (part + 1) * rows / kParts;
        backward_kernel().multiply(weight.const_data_ptr<float>() + first * depth,
                                   covariance.const_data_ptr<float>(), end - first, depth, depth,
                                   data(found) + first * depth);
    });
    return found;
}

Statistics of_expansion(const at::Tensor& weight, const Numbers& mean, const at::Tensor& of_x) {
    const int64_t rows = weight.size(0), depth = weight.size(1);
    const at::Tensor product = weight_times(weight, of_x);
    const auto *w = weight.const_data_ptr<float>(), *t = product.const_data_ptr<float>();
    Statistics found{Numbers(rows, 0), Numbers(rows, 0)};
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < depth; j++, w++, t++) {
            found.mean[i] += static_cast<double>(*w) * mean[j];
            found.var[i] += static_cast<double>(*w) * static_cast<double>(*t);
        }
        found.var[i] = std::max(found.var[i], 0.0);
    }
    return found;
}

// The stage with the statistics of the batch; the convolution's bias moves the mean.
void set_statistics(Stage& stage, const Statistics& found) {
    Numbers mean = numbers(stage[kBias], static_cast<int64_t>(found.mean.size()), 0);
    for (size_t i = 0; i < mean.size(); i++) mean[i] += found.mean[i];
    stage[kMean] = doubles_of(mean), stage[kVar] = doubles_of(found.var);
}

Stage without_affine(Stage stage) {
    stage[kGamma] = stage[kBeta] = at::Tensor();
    return stage;
}

Stage without_norm(Stage stage) {
    stage[kGamma] = stage[kBeta] = stage[kMean] = stage[kVar] = at::Tensor();
    return stage;
}

// The block on its way through the op: its stages, and the weights that they are folded to.
struct TrainedBlock {
    std::array<Stage, kStages> stages;
    std::array<double, kStages> eps{};
    Live live;
    int64_t stride, dilation;
    at::IntArrayRef padding;
    at::ArrayRef<double> clip_expand, clip_dw;
    OptionalTensor w_expand, b_expand, b_dw, b_project;
    at::Tensor w_dw, w_project;

    TrainedBlock(const c10::List<OptionalTensor>& layers, at::ArrayRef<double> eps_of,
                 const Live& live, int64_t stride, at::IntArrayRef padding, int64_t dilation,
                 at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw)
        : live(live),
          stride(stride),
          dilation(dilation),
          padding(padding),
          clip_expand(clip_expand),
          clip_dw(clip_dw) {
        TORCH_CHECK_VALUE(layers.size() == kStages * kOfStage && eps_of.size() == kStages,
                          "inverted_residual: 18 tensors of layers and three eps belong together");
        for (size_t i = 0; i < kStages; i++) {
            stages[i] = stage_of(layers, i), eps[i] = eps_of[i];
            if (stages[i][kWeight].defined())
                stages[i][kWeight] = checked_weight(stages[i][kWeight]);
        }
    }

    bool expands() const { return stages[kExpand][kWeight].defined(); }
    bool is_live(InStages stage) const { return live[stage] && stages[stage][kWeight].defined(); }

    void fold_expand() {
        if (expands()) std::tie(w_expand, b_expand) = folded(kExpand, stages[kExpand]);
    }
    void fold_depthwise(const Stage& stage) { std::tie(w_dw, b_dw) = folded(kDepthwise, stage); }
    // A live norm is left to what comes after the op.
    void fold_project() {
        const Stage& stage = stages[kProject];
        std::tie(w_project, b_project) =
            folded(kProject, live[kProject] ? without_norm(stage) : stage);
    }

    OpArguments arguments(const at::Tensor& x) const {
        return {"inverted_residual", x,         w_expand,  b_expand, w_dw,     b_dw,
                w_project,           b_project, stride,    padding,  dilation, false,
                clip_expand,         clip_dw,   kUnbounded};
    }

 private:
    std::pair<at::Tensor, at::Tensor> folded(InStages which, const Stage& stage) const {
        Tensors found;
        fold(stage, eps[which], found);
        return {found[0], found[1]};
    }
};

at::Tensor channels_last(const at::Tensor& tensor) {
    return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor like(const at::Tensor& images) {
    return at::empty(images.sizes(), images.options(), at::MemoryFormat::ChannelsLast);
}

// y, what the projection gives, mean and covariance of x, then mean and biased variance of every
// stage (float64); empty: not there.
Tensors train_forward(const at::Tensor& x_given, const c10::List<OptionalTensor>& layers,
                      at::ArrayRef<double> eps, Live live, int64_t stride, at::IntArrayRef padding,
                      int64_t dilation, bool residual, at::ArrayRef<double> clip_expand,
                      at::ArrayRef<double> clip_dw) {
    TrainedBlock block(layers, eps, live, stride, padding, dilation, clip_expand, clip_dw);
    const at::Tensor x = channels_last(x_given), none = at::empty({0}, at::kFloat);
    Tensors found(4 + 2 * kStages, none);
    if (block.is_live(kExpand)) {
        const Rows rows(x);
        const Statistics of_x = statistics(rows);
        const std::vector<float> mean = rounded(of_x.mean);
        found[2] = vector_of(of_x.mean, at::kFloat);
        found[3] = covariance(rows, mean.data());
        set_statistics(block.stages[kExpand],
                       of_expansion(block.stages[kExpand][kWeight], of_x.mean, found[3]));
    }
    block.fold_expand();
    block.fold_project();
    if (block.is_live(kDepthwise)) {
        Stage& stage = block.stages[kDepthwise];
        Stage plain = without_norm(stage);
        plain[kBias] = at::Tensor();
        block.fold_depthwise(plain);
        const BackwardCall call(block.arguments(x));
        Statistics of_dw{Numbers(call.args.hidden_channels), Numbers(call.args.hidden_channels)};
        call.depthwise_moments(of_dw.mean.data(), of_dw.var.data());
        const auto pixels = static_cast<double>(call.args.N * call.args.H_out * call.args.W_out);
        for (double& n : of_dw.var) n /= pixels;
        set_statistics(stage, of_dw);
    }
    block.fold_depthwise(block.stages[kDepthwise]);
    const at::Tensor projected = run_op(block.arguments(x));
    if (!live[kProject]) {
        found[0] = residual ? projected.add(x) : projected;
    } else {
        const Rows rows(projected);
        const Statistics of_rows = statistics(rows);
        Stage& stage = block.stages[kProject];
        stage[kMean] = doubles_of(of_rows.mean), stage[kVar] = doubles_of(of_rows.var);
        const Norm norm(stage, eps[kProject]);
        const std::vector<float> mean = rounded(of_rows.mean), scale = rounded(norm.scale),
                                 beta = rounded(numbers(stage[kBeta], rows.channels, 0));
        found[0] = like(projected), found[1] = projected;
        rows.each_part([&](int64_t, int64_t first, int64_t count) {
            const int64_t at = first * rows.channels;
            backward_kernel().normalize(
                rows.begin + at, count, rows.channels, {mean.data(), scale.data(), beta.data()},
                residual ? x.const_data_ptr<float>() + at : nullptr, data(found[0]) + at);
        });
    }
    for (size_t i = 0; i < kStages; i++)
        if (block.is_live(static_cast<InStages>(i)))
            found[4 + 2 * i] = block.stages[i][kMean], found[5 + 2 * i] = block.stages[i][kVar];
    return found;
}

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

// Gradients, as far as they are needed, of x and of the layers. `saved`: what the forward pass gave
// after y; the layers have its statistics in the place of theirs.
Tensors train_backward(const at::Tensor& grad_y_given, const at::Tensor& x_given,
                       const c10::List<OptionalTensor>& layers, const at::TensorList saved,
                       at::ArrayRef<double> eps, Live live, int64_t stride, at::IntArrayRef padding,
                       int64_t dilation, bool residual, at::ArrayRef<double> clip_expand,
                       at::ArrayRef<double> clip_dw, NeedsGrad needs_grad) {
    TORCH_CHECK_VALUE(saved.size() == 3,
                      "inverted_residual: the projection, and mean and covariance of x, are saved");
    TrainedBlock block(layers, eps, live, stride, padding, dilation, clip_expand, clip_dw);
    const at::Tensor x = channels_last(x_given), grad_y = channels_last(grad_y_given);
    const auto needs = [&](InStages stage, OfStage tensor) {
        return needs_grad[1 + stage * kOfStage + tensor];
    };
    const auto needs_any = [&](InStages stage) {
        const bool* const of_stage = &needs_grad[1 + stage * kOfStage];
        return std::any_of(of_stage, of_stage + kOfStage, [](bool n) { return n; });
    };
    block.fold_expand();
    block.fold_project();
    const Stage& depthwise = block.stages[kDepthwise];
    block.fold_depthwise(live[kDepthwise] ? without_affine(depthwise) : depthwise);

    BackwardCall call(block.arguments(x));
    OfProjection of_projection{grad_y, {}, {}};
    if (live[kProject])
        of_projection = through_norm(grad_y, saved[0], block.stages[kProject], eps[kProject]);
    call.set_grad_y(of_projection.projected);

    const int64_t hidden = call.args.hidden_channels;
    const auto pixels = static_cast<double>(call.args.N * call.args.H_out * call.args.W_out);
    const std::vector<float> gamma = rounded(numbers(depthwise[kGamma], hidden, 1)),
                             beta = rounded(numbers(depthwise[kBeta], hidden, 0));
    Numbers sums(2 * hidden, 0);
    const LiveNorm norm{LiveNorm::Pass::together, gamma.data(), beta.data(), sums.data(), pixels};
    if (live[kDepthwise]) call.args.norm = &norm;
    const bool is_expand_live = block.is_live(kExpand);
    // A live norm of the expansion hands its gradient on to x through the sums of all of these.
    const bool through_expand = needs_any(kExpand) || (is_expand_live && needs_grad[0]);
    const bool needs_dw = needs_any(kDepthwise);
    const Tensors gradients = call.gradients(
        live[kDepthwise] ? choose_training_schedule(call.args, kernel().lanes)
                         : choose_backward_schedule(call.args, kernel().lanes),
        {needs_grad[0], through_expand && block.expands(), through_expand && block.expands(),
         needs_dw, needs_dw && !live[kDepthwise], needs_any(kProject)});

    size_t next = 0;
    const auto take = [&](bool is_there) { return is_there ? gradients[next++] : at::Tensor(); };
    const at::Tensor of_x = take(needs_grad[0]);
    const at::Tensor of_w_expand = take(through_expand && block.expands());
    const at::Tensor of_b_expand = take(through_expand && block.expands());
    const at::Tensor of_w_dw = take(needs_dw), of_b_dw = take(needs_dw && !live[kDepthwise]);
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
    if (is_expand_live) {
        if (through_expand) {
            const Stage& stage = block.stages[kExpand];
            const at::Tensor of_weight = at::empty(stage[kWeight].sizes(), at::kFloat);
            const Norm scaled(stage, eps[kExpand]);
            Numbers of_scale(hidden);
            backward_kernel().unfold(of_w_expand.const_data_ptr<float>(),
                                     stage[kWeight].const_data_ptr<float>(), scaled.scale.data(),
                                     hidden, call.args.in_channels, data(of_weight),
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
    } else {
        if (block.expands()) add_frozen(kExpand, of_w_expand, of_b_expand);
        if (needs_grad[0] && residual) of_x.add_(grad_y);
    }
    if (live[kDepthwise])
        add_live(kDepthwise, without_affine(depthwise), of_w_dw,
                 Numbers(sums.begin() + hidden, sums.end()),
                 Numbers(sums.begin(), sums.begin() + hidden));
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
    m.impl("inverted_residual_training_cpu", &train_forward);
    m.impl("inverted_residual_training_backward_cpu", &train_backward);
}

}  // namespace mnv2::cpu
