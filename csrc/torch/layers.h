// A convolution with the batch norm after it, as tensors, and the folding of both.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "../cpu/backward.h"
#include "host.h"

namespace mnv2::cpu {

constexpr size_t kOfStage = 6, kStages = 3;
enum OfStage { kWeight, kBias, kGamma, kBeta, kMean, kVar };

// By OfStage; undefined: there is none.
using Stage = std::array<at::Tensor, kOfStage>;
using Numbers = std::vector<double>;

const BackwardKernel& backward_kernel();

// Of a vector, whatever its dtype; `missing` throughout where there is none.
Numbers numbers(const at::Tensor& vector, int64_t size, double missing);

at::Tensor vector_of(const Numbers& numbers, at::ScalarType dtype);

// What a stage computes with: y = conv(x) * scale + (bias - mean) * scale + beta.
struct Norm {
    Numbers inverse, gamma, scale;

    Norm(const Stage& stage, double eps);
};

Stage stage_of(const c10::List<OptionalTensor>& layers, size_t index);

// Contiguous, or an error.
at::Tensor checked_weight(const at::Tensor& weight);

// Adds folded weight and bias, as block/fold.py has them.
void fold(const Stage& stage, double eps, std::vector<at::Tensor>& found);

// (bias - mean) * scale + beta.
at::Tensor folded_bias(const Stage& stage, const Norm& norm);

// Adds the gradients that are needed of a stage's tensors, from the gradients of its folded ones.
// That of the weight is laid out like the convolution's, and becomes its gradient.
void unfold(const Stage& stage, double eps, const bool* needs, const at::Tensor& of_folded_weight,
            const at::Tensor& of_folded_bias, std::vector<at::Tensor>& found);

}  // namespace mnv2::cpu
