#include "layers.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "cpu.h"

namespace mnv2::cpu {

const BackwardKernel& backward_kernel() { return select_backward_kernel(kernel().name); }

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
    const at::Tensor vector = at::empty({static_cast<int64_t>(numbers.size())}, at::kDouble);
    std::copy(numbers.begin(), numbers.end(), vector.mutable_data_ptr<double>());
    return vector.to(dtype);
}

Norm::Norm(const Stage& stage, double eps) {
    const int64_t size = stage[kWeight].size(0);
    inverse = numbers(stage[kVar], size, 1), gamma = numbers(stage[kGamma], size, 1);
    if (stage[kVar].defined())
        for (double& n : inverse) n = 1 / std::sqrt(n + eps);
    scale = inverse;
    for (int64_t i = 0; i < size; i++) scale[i] *= gamma[i];
}

at::Tensor checked_weight(const at::Tensor& weight) {
    TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat && weight.device().is_cpu(),
                     "inverted_residual: a layer's weight must be float32 on the CPU, got ",
                     weight.scalar_type(), " on ", weight.device());
    TORCH_CHECK_VALUE(weight.dim() == 4,
                      "inverted_residual: a layer's weight must have four sizes");
    check_memory("inverted_residual", "a layer's weight", weight);
    return weight.contiguous();
}

at::Tensor folded_bias(const Stage& stage, const Norm& norm) {
    const int64_t rows = stage[kWeight].size(0);
    Numbers sums = numbers(stage[kBias], rows, 0);
    const Numbers means = numbers(stage[kMean], rows, 0), betas = numbers(stage[kBeta], rows, 0);
    for (int64_t i = 0; i < rows; i++) sums[i] = (sums[i] - means[i]) * norm.scale[i] + betas[i];
    return vector_of(sums, at::kFloat);
}

void fold(const Stage& stage, double eps, std::vector<at::Tensor>& found) {
    const at::Tensor weight = checked_weight(stage[kWeight]);
    const int64_t rows = weight.size(0), columns = rows == 0 ? 0 : weight.numel() / rows;
    const Norm norm(stage, eps);
    found.push_back(weight.size(2) == 1
                        ? at::empty({columns, rows}, at::kFloat)
                        : at::empty({weight.size(2), weight.size(3), rows}, at::kFloat));
    backward_kernel().fold(weight.const_data_ptr<float>(), norm.scale.data(), rows, columns,
                           found.back().mutable_data_ptr<float>());
    found.push_back(folded_bias(stage, norm));
}

Stage stage_of(const c10::List<OptionalTensor>& layers, size_t index) {
    Stage stage;
    for (size_t i = 0; i < kOfStage; i++) {
        const OptionalTensor tensor = layers.get(index * kOfStage + i);
        if (tensor) stage[i] = *tensor;
    }
    return stage;
}

void unfold(const Stage& stage, double eps, const bool* needs, const at::Tensor& of_folded_weight,
            const at::Tensor& of_folded_bias, std::vector<at::Tensor>& found) {
    if (std::none_of(needs, needs + kOfStage, [](bool n) { return n; })) return;
    const int64_t rows = stage[kWeight].size(0);
    const int64_t columns = rows == 0 ? 0 : stage[kWeight].numel() / rows;
    const Norm norm(stage, eps);
    at::Tensor of_weight;
    Numbers of_scale(rows, 0);
    const bool needs_scale = needs[kGamma] || needs[kVar];
    if (needs[kWeight] || needs_scale) {
        const at::Tensor weight = checked_weight(stage[kWeight]);
        of_weight = of_folded_weight.view(weight.sizes());
        backward_kernel().scale_rows(of_weight.mutable_data_ptr<float>(),
                                     weight.const_data_ptr<float>(), norm.scale.data(), rows,
                                     columns, of_scale.data());
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

}  // namespace mnv2::cpu
