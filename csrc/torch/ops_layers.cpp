// Float32 layers on the CPU: folding of a convolution with the batch norm after it.
#include <torch/library.h>

#include <vector>

#include "layers.h"

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

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("fold_layers_cpu", &fold_layers_cpu); }

}  // namespace mnv2::cpu
