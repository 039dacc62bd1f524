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
#include <optional>
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
    // Of what is folded: the scale of every output channel, and the bias.
    std::array<std::vector<float>, kStages> scales;
    std::array<OptionalTensor, kStages> biases;
    OptionalTensor w_dw;

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

    // A stage with a live norm as the convolution alone, without its bias but for the projection's:
    // the statistics are those of what it gives.
    Stage as_it_is(InStages stage) const {
        if (!is_live(stage)) return stages[stage];
        Stage plain = without_norm(stages[stage]);
        if (stage != kProject) plain[kBias] = at::Tensor();
        return plain;
    }

    // What a stage is folded to.
    void fold(InStages which, const Stage& stage) {
        if (!stage[kWeight].defined()) return;
        const Norm norm(stage, eps[which]);
        biases[which] = folded_bias(stage, norm);
        scales[which] = rounded(norm.scale);
        if (which != kDepthwise) return;
        Tensors found;
        cpu::fold(stage, eps[which], found);
        w_dw = found[0];
    }

    // The op's call with folded weights.
    at::Tensor run(const at::Tensor& x) const {
        const auto folded = [this](InStages which, const Stage& stage) {
            Tensors found;
            if (stage[kWeight].defined()) cpu::fold(stage, eps[which], found);
            return found.empty() ? OptionalTensor() : OptionalTensor(found[0]);
        };
        const OptionalTensor w_expand = folded(kExpand, stages[kExpand]);
        return run_op(arguments(x, w_expand, *folded(kProject, as_it_is(kProject))));
    }

    // The same call with the weights of the convolutions.
    BackwardCall call(const at::Tensor& x) const {
        const auto matrix = [this](InStages which) {
            const at::Tensor& weight = stages[which][kWeight];
            return weight.view({weight.size(0), weight.size(1)}).t();
        };
        const OptionalTensor w_expand =
            expands() ? OptionalTensor(matrix(kExpand)) : OptionalTensor();
        BackwardCall found(checked_call(arguments(x, w_expand, matrix(kProject))));
        const auto weight = [this](InStages which) {
            return stages[which][kWeight].const_data_ptr<float>();
        };
        if (expands()) found.args.conv_expand = weight(kExpand);
        found.args.scale_expand = scales[kExpand].data();
        found.args.conv_project = weight(kProject);
        found.args.scale_project = scales[kProject].data();
        return found;
    }

 private:
    OpArguments arguments(const at::Tensor& x, const OptionalTensor& w_expand,
                          const at::Tensor& w_project) const {
        return {"inverted_residual",
                x,
                w_expand,
                biases[kExpand],
                *w_dw,
                biases[kDepthwise],
                w_project,
                biases[kProject],
                stride,
                padding,
                dilation,
                false,
                clip_expand,
                clip_dw,
                kUnbounded};
    }
};

at::Tensor channels_last(const at::Tensor& tensor) {
    return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor like(const at::Tensor& images) {
    return at::empty(images.sizes(), images.options(), at::MemoryFormat::ChannelsLast);
}

// What a live norm computes with in a forward pass, and the statistics that it finds.
struct Forward {
    std::vector<float> gamma, beta;
    Statistics found;
    ForwardNorm norm;

    Forward(const Stage& stage, double eps)
        : gamma(rounded(numbers(stage[kGamma], stage[kWeight].size(0), 1))),
          beta(rounded(numbers(stage[kBeta], stage[kWeight].size(0), 0))),
          found{Numbers(gamma.size()), Numbers(gamma.size())},
          norm{gamma.data(), beta.data(), eps, found.mean.data(), found.var.data()} {}
};

at::Tensor project_whole_batch(TrainedBlock& block, const BackwardCall& call,
                               const BackwardSchedule& schedule) {
    std::array<std::optional<Forward>, 2> norms;
    for (const InStages stage : {kExpand, kDepthwise})
        if (block.is_live(stage)) norms[stage].emplace(block.stages[stage], block.eps[stage]);
    const auto norm = [&](InStages stage) { return norms[stage] ? &norms[stage]->norm : nullptr; };
    const at::Tensor projected = call.train(schedule, norm(kExpand), norm(kDepthwise));
    for (const InStages stage : {kExpand, kDepthwise})
        if (norms[stage]) set_statistics(block.stages[stage], norms[stage]->found);
    return projected;
}

// Statistics first, then the op as in inference; sets mean and covariance of x.
at::Tensor project_by_bands(TrainedBlock& block, const at::Tensor& x,
                            const BackwardSchedule& schedule, at::Tensor& x_mean,
                            at::Tensor& x_covariance) {
    if (block.is_live(kExpand)) {
        Stage& stage = block.stages[kExpand];
        const Rows rows(x);
        const Statistics of_x = statistics(rows);
        x_mean = vector_of(of_x.mean, at::kFloat);
        x_covariance = covariance(rows, x_mean.const_data_ptr<float>());
        set_statistics(stage, of_expansion(stage[kWeight], of_x.mean, x_covariance));
        block.fold(kExpand, stage);
    }
    if (block.is_live(kDepthwise)) {
        Stage& stage = block.stages[kDepthwise];
        const BackwardCall call = block.call(x);
        Statistics found{Numbers(call.args.hidden_channels), Numbers(call.args.hidden_channels)};
        call.depthwise_moments(schedule, found.mean.data(), found.var.data());
        const auto pixels = static_cast<double>(call.args.N * call.args.H_out * call.args.W_out);
        for (double& n : found.var) n /= pixels;
        set_statistics(stage, found);
        block.fold(kDepthwise, stage);
    }
    return block.run(x);
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
    block.fold(kExpand, block.as_it_is(kExpand));
    block.fold(kDepthwise, block.as_it_is(kDepthwise));
    block.fold(kProject, block.as_it_is(kProject));
    const BackwardCall call = block.call(x);
    const BackwardSchedule schedule = choose_training_schedule(call.args, kernel().lanes);
    const at::Tensor projected = schedule.whole_batch
                                     ? project_whole_batch(block, call, schedule)
                                     : project_by_bands(block, x, schedule, found[2], found[3]);
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
    const at::Tensor of_w_dw = take(needs_dw), of_b_dw = take(needs_dw && !live[kDepthwise]);
    const at::Tensor of_w_project = take(needs_any(kProject));

    Tensors found;
    const auto add = [&](InStages stage, OfStage which, const Numbers& gradient) {
        if (needs(stage, which))
            found.push_back(vector_of(gradient, block.stages[stage][which].scalar_type()));
    };
    const auto layout = [](InStages stage) {
        return stage == kDepthwise ? Layout::folded : Layout::rows;
    };
    // Of a live norm: the convolution's bias is taken away again by the mean.
    const auto add_live = [&](InStages stage, const Stage& folded_as, const at::Tensor& of_weight,
                              const Numbers& of_gamma, const Numbers& of_beta) {
        const bool only_weight[kOfStage] = {needs(stage, kWeight)};
        unfold(folded_as, eps[stage], only_weight, of_weight, at::Tensor(), found, layout(stage));
        const Stage& own = block.stages[stage];
        add(stage, kBias, Numbers(own[kWeight].size(0), 0));
        add(stage, kGamma, of_gamma), add(stage, kBeta, of_beta);
    };
    const auto add_frozen = [&](InStages stage, const at::Tensor& of_weight,
                                const at::Tensor& of_bias) {
        unfold(block.stages[stage], eps[stage], &needs_grad[1 + stage * kOfStage], of_weight,
               of_bias, found, layout(stage));
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
    m.impl("inverted_residual_training_cpu", &train_forward);
    m.impl("inverted_residual_training_backward_cpu", &train_backward);
}

}  // namespace mnv2::cpu
