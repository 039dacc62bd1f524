// Gradients of the op on CPU tensors.
#pragma once
#include <array>
#include <limits>
#include <vector>

#include "../cpu/backward.h"
#include "host.h"

namespace mnv2::cpu {

// The bounds of no clip.
constexpr double kUnbounded[] = {-std::numeric_limits<double>::infinity(),
                                 std::numeric_limits<double>::infinity()};

// A checked call of a block in float32 whose gradients are asked for. What the arguments say of
// clip_project and residual is not looked at.
struct BackwardCall {
    static constexpr size_t kTensors = 6;

    Call call;
    at::Tensor grad;
    BackwardArgs args{};

    explicit BackwardCall(Call checked);
    // The gradient of the result before clip_project and residual.
    void set_grad_y(const at::Tensor& grad_y);
    // What the projection gives, bias and all, where the whole batch goes through together.
    at::Tensor train(const BackwardSchedule& schedule, const ForwardNorm* norm_expand,
                     const ForwardNorm* norm_dw) const;
    // Of x, w_expand, b_expand, w_dw, b_dw, w_project, as far as they are wanted and exist; those
    // of convolutions are laid out like these. Adds to the sums of live norms, and then needs the
    // schedule for training.
    std::vector<at::Tensor> gradients(const BackwardSchedule& schedule,
                                      std::array<bool, kTensors> needs_grad) const;
    // Moments of what w_dw and b_dw give, over the whole batch: hidden_channels numbers each.
    void depthwise_moments(const BackwardSchedule& schedule, double* mean, double* squares) const;
};

}  // namespace mnv2::cpu
