// From tensors to BlockSizes: the op's contract once more, since raw pointers follow from it. The
// sentences are those of `check` in mnv2_kernels/contract.py, which serves every other path.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>

#include "../block.h"

namespace mnv2 {

using OptionalTensor = std::optional<at::Tensor>;

// What a tensor consists of; nullopt: nothing that a kernel takes.
std::optional<Element> element_of(at::ScalarType dtype);

// ValueError where a tensor's storage has been freed or made smaller under it; `name` is what the
// caller knows it by.
void check_memory(const char* op, const std::string& name, const at::Tensor& tensor);

// A checked call: dense inputs, the result to be filled, and the sizes.
struct Call {
    // x (channels_last), w_expand, b_expand, w_dw, b_dw, w_project, b_project; undefined: absent.
    std::array<at::Tensor, 7> inputs;
    at::Tensor y;
    BlockSizes sizes;
};

// Rows (or columns) of the result; `pad` is that of both sides together.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation);

Call make_call(const at::Tensor& x, const OptionalTensor& w_expand, const OptionalTensor& b_expand,
               const at::Tensor& w_dw, const OptionalTensor& b_dw, const at::Tensor& w_project,
               const OptionalTensor& b_project, int64_t stride, at::IntArrayRef padding,
               int64_t dilation, bool residual, at::ArrayRef<double> clip_expand,
               at::ArrayRef<double> clip_dw, at::ArrayRef<double> clip_project);

}  // namespace mnv2
