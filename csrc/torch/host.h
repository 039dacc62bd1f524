// From tensors to BlockSizes: the op's contract once more, since raw pointers follow from it. The
// sentences are the same as in `check` of mnv2_kernels/ops/contract.py, for every other path.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>

#include "../block.h"

namespace mnv2 {

using OptionalTensor = std::optional<at::Tensor>;

// The tensors of a squeeze-excite.
struct GateTensors {
    const OptionalTensor &w_squeeze, &b_squeeze, &w_excite, &b_excite;
};

// The arguments of inverted_residual in the order of its schema, and those that mbconv has besides.
struct OpArguments {
    const char* op;
    const at::Tensor& x;
    const OptionalTensor &w_expand, &b_expand;
    const at::Tensor& w_dw;
    const OptionalTensor& b_dw;
    const at::Tensor& w_project;
    const OptionalTensor& b_project;
    int64_t stride;
    at::IntArrayRef padding;
    int64_t dilation;
    bool residual;
    at::ArrayRef<double> clip_expand, clip_dw, clip_project;
    // After expansion, depthwise, projection and squeeze: 0 a clip, otherwise a curve in the order
    // of `Curve`; no numbers: clips.
    at::IntArrayRef curves = {};
    const GateTensors* gate = nullptr;
    at::ArrayRef<double> clip_squeeze = {};
    int64_t scale = 0;  // of the gate: 0 sigmoid, 1 hardsigmoid
};

// The op as its schema has it, for a function of OpArguments.
template <at::Tensor (*run)(const OpArguments&)>
at::Tensor inverted_residual(const at::Tensor& x, const OptionalTensor& w_expand,
                             const OptionalTensor& b_expand, const at::Tensor& w_dw,
                             const OptionalTensor& b_dw, const at::Tensor& w_project,
                             const OptionalTensor& b_project, int64_t stride,
                             at::IntArrayRef padding, int64_t dilation, bool residual,
                             at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw,
                             at::ArrayRef<double> clip_project) {
    return run({"inverted_residual", x, w_expand, b_expand, w_dw, b_dw, w_project, b_project,
                stride, padding, dilation, residual, clip_expand, clip_dw, clip_project});
}

// What a tensor consists of; nullopt: nothing that a kernel takes.
std::optional<Element> element_of(at::ScalarType dtype);

// The same of x; TypeError, in the name of an op, where `kernels` take no such x.
Element checked_element(const char* op, const at::Tensor& x, const char* kernels);

// ValueError where a tensor's storage has been freed or made smaller under it; `name` is what the
// caller knows it by.
void check_memory(const char* op, const std::string& name, const at::Tensor& tensor);

// A checked call: dense inputs with float32 biases, the result to be filled, and the sizes.
struct Call {
    // x (channels_last), w_expand, b_expand, w_dw, b_dw, w_project, b_project, then w_squeeze,
    // b_squeeze, w_excite, b_excite; undefined: absent.
    std::array<at::Tensor, 11> inputs;
    at::Tensor y;
    BlockSizes sizes;
    std::array<Curve, 3> curves;
    GateArgs gate;  // without pointers

    const void* pointer(size_t input) const {
        return inputs[input].defined() ? inputs[input].const_data_ptr() : nullptr;
    }
    // Sets the pointers to weights and biases of BlockArgs or cuda::Call.
    template <class Args>
    void set_weights(Args& args) const {
        const auto bias = [this](size_t i) { return static_cast<const float*>(pointer(i)); };
        args.w_expand = pointer(1), args.b_expand = bias(2);
        args.w_dw = pointer(3), args.b_dw = bias(4);
        args.w_project = pointer(5), args.b_project = bias(6);
    }
    // What BlockArgs have besides: curves and gate.
    void set_gate(BlockArgs& args) const {
        args.curve_expand = curves[0], args.curve_dw = curves[1], args.curve_project = curves[2];
        args.gate = gate;
        args.gate.w_squeeze = pointer(7), args.gate.w_excite = pointer(9);
        args.gate.b_squeeze = static_cast<const float*>(pointer(8));
        args.gate.b_excite = static_cast<const float*>(pointer(10));
    }
};

// Rows (or columns) of the result; `pad` is of both sides together.
int64_t output_size(int64_t size, int64_t kernel_size, int64_t stride, int64_t pad,
                    int64_t dilation);

// The arguments as they are, checked, with sizes; the result is not there yet.
Call checked_call(const OpArguments& arguments);

Call make_call(const OpArguments& arguments);

}  // namespace mnv2
