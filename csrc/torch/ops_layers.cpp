// Float32 layers on the CPU: folding of a convolution with the batch norm after it, and the
// gradients of a block's layers.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "layers.h"
#include "ops_backward.h"

namespace mnv2::cpu {

namespace {

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
