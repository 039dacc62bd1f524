// Gradients of the op on CPU tensors.
#pragma once
#include <array>
#include <vector>

#include "host.h"

namespace mnv2::cpu {

// Gradients of x, w_expand, b_expand, w_dw, b_dw, w_project, as far as they are wanted and exist.
// grad_y is the gradient of the result before clip_project and residual.
std::vector<at::Tensor> backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                     const OptionalTensor& w_expand, const OptionalTensor& b_expand,
                                     const at::Tensor& w_dw, const OptionalTensor& b_dw,
                                     const at::Tensor& w_project, int64_t stride,
                                     at::IntArrayRef padding, int64_t dilation,
                                     at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw,
                                     std::array<bool, 6> needs_grad);

}  // namespace mnv2::cpu
