// Gradients of the op on CPU tensors: float32. A task is a range of images and of hidden channels.
#include "ops_backward.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../cpu/backward.h"
#include "../cpu/sizes.h"
#include "cpu.h"
#include "host.h"

namespace mnv2::cpu {

namespace {

constexpr size_t kTensors = 6;

using Tensors = std::array<at::Tensor, kTensors>;

at::Tensor zeros_like(const at::Tensor& tensor) {
    return at::zeros(tensor.sizes(), at::TensorOptions().dtype(at::kFloat));
}

Gradients pointers(const Tensors& tensors) {
    std::array<float*, kTensors> p{};
    for (size_t i = 0; i < kTensors; i++)
        if (tensors[i].defined()) p[i] = tensors[i].mutable_data_ptr<float>();
    return {p[0], p[1], p[2], p[3], p[4], p[5]};
}

}  // namespace

std::vector<at::Tensor> backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                     const OptionalTensor& w_expand, const OptionalTensor& b_expand,
                                     const at::Tensor& w_dw, const OptionalTensor& b_dw,
                                     const at::Tensor& w_project, int64_t stride,
                                     at::IntArrayRef padding, int64_t dilation,
                                     at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw,
                                     std::array<bool, kTensors> needs_grad) {
    constexpr double kUnbounded[] = {-INFINITY, INFINITY};
    const OptionalTensor no_bias;
    Call call =
        make_call({"inverted_residual", x, w_expand, b_expand, w_dw, b_dw, w_project, no_bias,
                   stride, padding, dilation, false, clip_expand, clip_dw, kUnbounded});
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && grad_y.scalar_type() == at::kFloat,
                     "inverted_residual: x and grad_y must be float32 for the CPU kernel, got ",
                     x.scalar_type(), " and ", grad_y.scalar_type());
    TORCH_CHECK_VALUE(grad_y.sizes() == call.y.sizes(),
                      "inverted_residual: grad_y must have the shape of the result, ",
                      call.y.sizes(), ", got ", grad_y.sizes());
    check_memory("inverted_residual", "grad_y", grad_y);
    call.y.reset();
    const at::Tensor grad = grad_y.contiguous(at::MemoryFormat::ChannelsLast);

    BackwardArgs args{};
    static_cast<BlockSizes&>(args) = call.sizes;
    args.element = Element::single;
    call.set_weights(args);
    args.x = static_cast<const float*>(call.pointer(0));
    args.grad_y = grad.const_data_ptr<float>();

    const BackwardSchedule schedule = choose_backward_schedule(args, kernel().lanes);
    const BackwardSplit split = choose_backward_split(args, schedule);

    // parts[i] of range i of images, x_parts[i] of range i of groups.
    std::vector<Tensors> parts(split.images);
    std::vector<at::Tensor> x_parts(split.hidden);
    for (size_t i = 1; i < kTensors; i++)
        if (needs_grad[i] && call.inputs[i].defined())
            for (Tensors& part : parts) part[i] = zeros_like(call.inputs[i]);
    if (needs_grad[0])
        // All channels of a pixel are one slice of hidden ones where there is no expansion.
        for (size_t i = 0; i < x_parts.size(); i++)
            x_parts[i] = i == 0 || args.expansion
                             ? at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast)
                             : x_parts[0];

    const int64_t floats = backward_scratch(args, schedule);
    const bool sums_x = needs_grad[0] && args.expansion && split.hidden < schedule.groups;
    const int64_t most_images = ceil_div(args.N, split.images);
    const int64_t x_floats = sums_x ? aligned(most_images * args.H * args.W * args.in_channels) : 0;
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), split.images * split.hidden);
    const at::Tensor scratch =
        at::empty({threads * (floats + x_floats)}, at::TensorOptions().dtype(at::kFloat));
    auto* const scratch_begin = scratch.mutable_data_ptr<float>();
    const BackwardFn run = select_backward_kernel(kernel().name).run;
    torch_threads(threads).run(split.images * split.hidden, [&](int64_t task, int64_t thread) {
        const int64_t images = task / split.hidden, hidden = task % split.hidden;
        Tensors own = parts[images];
        own[0] = x_parts[hidden];
        float* const mine = scratch_begin + thread * (floats + x_floats);
        run(args, schedule, pointers(own), images * args.N / split.images,
            (images + 1) * args.N / split.images, hidden * schedule.groups / split.hidden,
            (hidden + 1) * schedule.groups / split.hidden, mine + floats, mine);
    });

    std::vector<at::Tensor> gradients;
    for (size_t i = 0; i < kTensors; i++) {
        if (!needs_grad[i] || !call.inputs[i].defined()) continue;
        at::Tensor sum = i == 0 ? x_parts[0] : parts[0][i];
        if (i > 0)
            for (size_t part = 1; part < parts.size(); part++) sum.add_(parts[part][i]);
        else if (args.expansion)
            for (size_t part = 1; part < x_parts.size(); part++) sum.add_(x_parts[part]);
        gradients.push_back(sum);
    }
    return gradients;
}

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("inverted_residual_backward_cpu", &backward_cpu); }

}  // namespace mnv2::cpu
