// Float32 layers on the CPU: folding of a convolution with the batch norm after it, and the
// gradients of a block's layers.
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../cpu/backward.h"
#include "cpu.h"
#include "ops_backward.h"

namespace mnv2::cpu {

namespace {

constexpr size_t kOfStage = 6, kStages = 3;
enum OfStage { kWeight, kBias, kGamma, kBeta, kMean, kVar };

// By OfStage; undefined: there is none.
using Stage = std::array<at::Tensor, kOfStage>;
using Numbers = std::vector<double>;

const BackwardKernel& backward_kernel() { return select_backward_kernel(kernel().name); }

// Of a vector, whatever its dtype; `missing` throughout where there is none.
Numbers numbers(const at::Tensor& vector, int64_t size, double missing) {
    Numbers found(size, missing);
    if (!vector.defined()) return found;
    TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == size,
                      "inverted_residual: vectors of a layer must have one number a channel, got ",
                      vector.sizes(), " for ", size);
    if (vector.scalar_type() == at::kFloat && vector.is_contiguous()) {
        const float* const from = vector.const_data_ptr<float>();
        std::copy(from, from + size, found.begin());
    } else {
        const at::Tensor copy = vector.to(at::kDouble).contiguous();
        const double* const from = copy.const_data_ptr<double>();
        std::copy(from, from + size, found.begin());
    }
    return found;
}

at::Tensor vector_of(const Numbers& numbers, at::ScalarType dtype) {
    const at::Tensor vector = at::empty({static_cast<int64_t>(numbers.size())}, at::kFloat);
    std::transform(numbers.begin(), numbers.end(), vector.mutable_data_ptr<float>(),
                   [](double n) { return static_cast<float>(n); });
    return vector.to(dtype);
}

// What a stage computes with: y = conv(x) * scale + (bias - mean) * scale + beta.
struct Norm {
    Numbers inverse, gamma, scale;

    Norm(const Stage& stage, double eps) {
        const int64_t size = stage[kWeight].size(0);
        inverse = numbers(stage[kVar], size, 1), gamma = numbers(stage[kGamma], size, 1);
        if (stage[kVar].defined())
            for (double& n : inverse) n = 1 / std::sqrt(n + eps);
        scale = inverse;
        for (int64_t i = 0; i < size; i++) scale[i] *= gamma[i];
    }
};

at::Tensor checked_weight(const at::Tensor& weight) {
    TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat && weight.device().is_cpu(),
                     "inverted_residual: a layer's weight must be float32 on the CPU, got ",
                     weight.scalar_type(), " on ", weight.device());
    TORCH_CHECK_VALUE(weight.dim() == 4,
                      "inverted_residual: a layer's weight must have four sizes");
    check_memory("inverted_residual", "a layer's weight", weight);
    return weight.contiguous();
}

// Adds folded weight and bias, as block/fold.py has them.
void fold(const Stage& stage, double eps, std::vector<at::Tensor>& found) {
    const at::Tensor weight = checked_weight(stage[kWeight]);
    const int64_t rows = weight.size(0), columns = rows == 0 ? 0 : weight.numel() / rows;
    const Norm norm(stage, eps);
    found.push_back(weight.size(2) == 1
                        ? at::empty({columns, rows}, at::kFloat)
                        : at::empty({weight.size(2), weight.size(3), rows}, at::kFloat));
    backward_kernel().fold(weight.const_data_ptr<float>(), norm.scale.data(), rows, columns,
                           found.back().mutable_data_ptr<float>());
    Numbers sums = numbers(stage[kBias], rows, 0);
    const Numbers means = numbers(stage[kMean], rows, 0), betas = numbers(stage[kBeta], rows, 0);
    for (int64_t i = 0; i < rows; i++) sums[i] = (sums[i] - means[i]) * norm.scale[i] + betas[i];
    found.push_back(vector_of(sums, at::kFloat));
}

Stage stage_of(const c10::List<OptionalTensor>& layers, size_t index) {
    Stage stage;
    for (size_t i = 0; i < kOfStage; i++) {
        const OptionalTensor tensor = layers.get(index * kOfStage + i);
        if (tensor) stage[i] = *tensor;
    }
    return stage;
}

// Folded weight and bias of every stage that there is.
std::vector<at::Tensor> fold_layers_cpu(const c10::List<OptionalTensor>& layers,
                                        at::ArrayRef<double> eps) {
    TORCH_CHECK_VALUE(layers.size() == eps.size() * kOfStage,
                      "inverted_residual: six tensors and an eps belong to a stage");
    std::vector<at::Tensor> found;
    for (size_t i = 0; i < eps.size(); i++) {
        const Stage stage = stage_of(layers, i);
        if (stage[kWeight].defined()) fold(stage, eps[i], found);
    }
    return found;
}

// Adds the gradients that are needed of a stage's tensors, from the gradients of its folded ones.
void unfold(const Stage& stage, double eps, const bool* needs, const at::Tensor& of_folded_weight,
            const at::Tensor& of_folded_bias, std::vector<at::Tensor>& found) {
    if (std::none_of(needs, needs + kOfStage, [](bool n) { return n; })) return;
    const int64_t rows = stage[kWeight].size(0);
    const int64_t columns = rows == 0 ? 0 : stage[kWeight].numel() / rows;
    const Norm norm(stage, eps);
    at::Tensor of_weight;
    Numbers of_scale(rows, 0);
    const bool needs_scale = needs[kGamma] || needs[kVar];
    if (needs[kWeight]) of_weight = at::empty(stage[kWeight].sizes(), at::kFloat);
    if (needs[kWeight] || needs_scale) {
        const at::Tensor weight = checked_weight(stage[kWeight]);
        backward_kernel().unfold(of_folded_weight.const_data_ptr<float>(),
                                 weight.const_data_ptr<float>(), norm.scale.data(), rows, columns,
                                 needs[kWeight] ? of_weight.mutable_data_ptr<float>() : nullptr,
                                 needs_scale ? of_scale.data() : nullptr);
    }
    const auto add = [&](OfStage which, const Numbers& gradient) {
        if (needs[which]) found.push_back(vector_of(gradient, stage[which].scalar_type()));
    };
    if (needs[kWeight]) found.push_back(of_weight);
    if (!of_folded_bias.defined()) return;
    const Numbers of_bias = numbers(of_folded_bias, rows, 0);
    Numbers times_scale = of_bias, of_var(rows, 0), of_gamma(rows, 0);
    const Numbers bias = numbers(stage[kBias], rows, 0), mean = numbers(stage[kMean], rows, 0);
    for (int64_t i = 0; i < rows; i++) {
        times_scale[i] *= norm.scale[i];
        of_scale[i] += of_bias[i] * (bias[i] - mean[i]);
        of_gamma[i] = of_scale[i] * norm.inverse[i];
        of_var[i] = of_gamma[i] * norm.gamma[i] * norm.inverse[i] * norm.inverse[i] / -2;
    }
    add(kBias, times_scale), add(kGamma, of_gamma), add(kBeta, of_bias);
    for (double& n : times_scale) n = -n;
    add(kMean, times_scale), add(kVar, of_var);
}

constexpr size_t kAll = 1 + kStages * kOfStage;

// The gradients that are needed of x and the 18 tensors of the stages (the expansion's are None
// where there is none), in this order. grad_y is the result's; the projection has no clip.
std::vector<at::Tensor> layers_backward_cpu(
    const at::Tensor& grad_y, const at::Tensor& x, const c10::List<OptionalTensor>& folded,
    const c10::List<OptionalTensor>& layers, at::ArrayRef<double> eps, int64_t stride,
    at::IntArrayRef padding, int64_t dilation, bool residual, at::ArrayRef<double> clip_expand,
    at::ArrayRef<double> clip_dw, std::array<bool, kAll> needs_grad) {
    TORCH_CHECK_VALUE(folded.size() == 6 && layers.size() == kAll - 1 && eps.size() == kStages,
                      "inverted_residual: six folded tensors, 18 of layers and three eps belong "
                      "together");
    std::array<bool, 7> needs{needs_grad[0]};
    for (size_t i = 0; i < kStages; i++) {
        const bool* const of_stage = &needs_grad[1 + i * kOfStage];
        const bool needs_scale = of_stage[kGamma] || of_stage[kVar];
        needs[1 + 2 * i] = of_stage[kWeight] || needs_scale;
        needs[2 + 2 * i] = of_stage[kBias] || of_stage[kBeta] || of_stage[kMean] || needs_scale;
    }
    const bool any = std::any_of(needs.begin(), needs.begin() + 6, [](bool n) { return n; });
    std::vector<at::Tensor> gradients;
    if (any)
        gradients = backward_cpu(grad_y, x, folded.get(0), folded.get(1), folded.get(2).value(),
                                 folded.get(3), folded.get(4).value(), stride, padding, dilation,
                                 clip_expand, clip_dw,
                                 {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5]});
    if (needs[6]) gradients.push_back(grad_y.sum(at::IntArrayRef{0, 2, 3}));
    if (residual && needs[0]) gradients[0].add_(grad_y);
    std::vector<at::Tensor> found;
    size_t next = 0;
    if (needs[0]) found.push_back(gradients[next++]);
    for (size_t i = 0; i < kStages; i++) {
        const at::Tensor of_weight = needs[1 + 2 * i] ? gradients[next++] : at::Tensor();
        const at::Tensor of_bias = needs[2 + 2 * i] ? gradients[next++] : at::Tensor();
        if (!of_weight.defined() && !of_bias.defined()) continue;
        unfold(stage_of(layers, i), eps[i], &needs_grad[1 + i * kOfStage], of_weight, of_bias,
               found);
    }
    return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) {
    m.impl("fold_layers_cpu", &fold_layers_cpu);
    m.impl("inverted_residual_layers_backward_cpu", &layers_backward_cpu);
}

}  // namespace mnv2::cpu
