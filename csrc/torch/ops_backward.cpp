// Gradients of the op on CPU tensors: float32. A task is a range of images and of hidden channels.
#include "ops_backward.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "../cpu/backward.h"
#include "../cpu/sizes.h"
#include "cpu.h"
#include "host.h"

namespace mnv2::cpu {

namespace {

constexpr size_t kTensors = BackwardCall::kTensors;

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

// run(image range, group range, scratch) for every task of a split, on torch's threads.
template <class Run>
void run_tasks(const BackwardSplit& split, int64_t floats, const Run& run) {
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), split.images * split.hidden);
    const at::Tensor scratch = at::empty({threads * floats}, at::TensorOptions().dtype(at::kFloat));
    auto* const begin = scratch.mutable_data_ptr<float>();
    torch_threads(threads).run(split.images * split.hidden, [&](int64_t task, int64_t thread) {
        run(task / split.hidden, task % split.hidden, begin + thread * floats);
    });
}

// Part `index` of `parts` of [0, size).
std::pair<int64_t, int64_t> part_of(int64_t size, int64_t index, int64_t parts) {
    return {index * size / parts, (index + 1) * size / parts};
}

}  // namespace

BackwardCall::BackwardCall(Call checked) : call(std::move(checked)) {
    const at::Tensor& x = call.inputs[0];
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat,
                     "inverted_residual: x must be float32 for the CPU kernel, got ",
                     x.scalar_type());
    static_cast<BlockSizes&>(args) = call.sizes;
    args.element = Element::single;
    call.set_weights(args);
    args.x = static_cast<const float*>(call.pointer(0));
    call.y.reset();
}

void BackwardCall::set_grad_y(const at::Tensor& grad_y) {
    const std::array<int64_t, 4> sizes{args.N, args.out_channels, args.H_out, args.W_out};
    const at::IntArrayRef shape(sizes);
    TORCH_CHECK_TYPE(grad_y.scalar_type() == at::kFloat,
                     "inverted_residual: grad_y must be float32 for the CPU kernel, got ",
                     grad_y.scalar_type());
    TORCH_CHECK_VALUE(grad_y.sizes() == shape,
                      "inverted_residual: grad_y must have the shape of the result, ", shape,
                      ", got ", grad_y.sizes());
    check_memory("inverted_residual", "grad_y", grad_y);
    grad = grad_y.contiguous(at::MemoryFormat::ChannelsLast);
    args.grad_y = grad.const_data_ptr<float>();
}

std::vector<at::Tensor> BackwardCall::gradients(const BackwardSchedule& schedule,
                                                std::array<bool, kTensors> needs_grad) const {
    const BackwardSplit split = choose_backward_split(args, schedule);
    // parts[i] of range i of images, x_parts[i] of range i of groups.
    std::vector<Tensors> parts(split.images);
    std::vector<at::Tensor> x_parts(split.hidden);
    const auto is_of_convolution = [this](size_t i) {
        return (i == 1 && args.conv_expand != nullptr) || (i == 5 && args.conv_project != nullptr);
    };
    for (size_t i = 1; i < kTensors; i++)
        if (needs_grad[i] && call.inputs[i].defined())
            for (Tensors& part : parts) {
                const at::Tensor& tensor = call.inputs[i];
                if (!is_of_convolution(i))
                    part[i] = zeros_like(tensor);
                else if (schedule.whole_batch)
                    part[i] = at::empty(tensor.t().sizes(), tensor.options());
                else
                    part[i] = at::zeros(tensor.t().sizes(), tensor.options());
            }
    const at::Tensor& x = call.inputs[0];
    if (needs_grad[0])
        // All channels of a pixel are one slice of hidden ones where there is no expansion.
        for (size_t i = 0; i < x_parts.size(); i++)
            x_parts[i] = i == 0 || args.expansion
                             ? at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast)
                             : x_parts[0];

    const int64_t floats = backward_scratch(args, schedule, args.conv_project != nullptr);
    const bool sums_x = needs_grad[0] && args.expansion && split.hidden < schedule.groups;
    const int64_t most_images = ceil_div(args.N, split.images);
    const int64_t x_floats = sums_x ? aligned(most_images * args.H * args.W * args.in_channels) : 0;
    const BackwardFn run = select_backward_kernel(kernel().name).run;
    const auto run_pass = [&](const BackwardArgs& of_pass, int64_t images, int64_t hidden,
                              const Gradients& out, float* scratch) {
        const auto [image_begin, image_end] = part_of(args.N, images, split.images);
        const auto [group_begin, group_end] = part_of(schedule.groups, hidden, split.hidden);
        run(of_pass, schedule, out, image_begin, image_end, group_begin, group_end,
            scratch + floats, scratch);
    };
    const auto outputs = [&](int64_t images, int64_t hidden) {
        Tensors own = parts[images];
        own[0] = x_parts[hidden];
        return pointers(own);
    };
    BackwardArgs of_pass = args;
    of_pass.pass = Pass::together;
    bool has_gradients = true;
    if (args.norm_dw != nullptr && !schedule.whole_batch) {
        const int64_t numbers = 2 * args.hidden_channels;
        std::vector<double> sums(split.images * numbers, 0);
        run_tasks(split, floats, [&](int64_t images, int64_t hidden, float* scratch) {
            LiveNorm own = *args.norm_dw;
            own.sums = &sums[images * numbers];
            BackwardArgs with_own = args;
            with_own.norm_dw = &own, with_own.pass = Pass::sums;
            Gradients out{};
            out.w_project = outputs(images, hidden).w_project;
            run_pass(with_own, images, hidden, out, scratch);
        });
        for (size_t i = 0; i < sums.size(); i++) args.norm_dw->sums[i % numbers] += sums[i];
        of_pass.pass = Pass::gradients;
        has_gradients = std::any_of(needs_grad.begin(), needs_grad.end() - 1,
                                    [](bool needed) { return needed; });
    }
    if (has_gradients)
        run_tasks(split, floats + x_floats, [&](int64_t images, int64_t hidden, float* scratch) {
            Gradients out = outputs(images, hidden);
            if (of_pass.pass == Pass::gradients) out.w_project = nullptr;
            run_pass(of_pass, images, hidden, out, scratch);
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

at::Tensor BackwardCall::train(const BackwardSchedule& schedule, const ForwardNorm* norm_expand,
                               const ForwardNorm* norm_dw) const {
    std::vector<at::Tensor> parts(schedule.groups);
    for (at::Tensor& part : parts)
        part = at::empty({args.N, args.out_channels, args.H_out, args.W_out},
                         call.inputs[0].options(), at::MemoryFormat::ChannelsLast);
    const TrainingForwardFn run = select_backward_kernel(kernel().name).train;
    run_tasks({1, schedule.groups}, backward_scratch(args, schedule, args.conv_project != nullptr),
              [&](int64_t, int64_t group, float* scratch) {
                  run(args, schedule, norm_expand, norm_dw, group, group + 1,
                      parts[group].mutable_data_ptr<float>(), scratch);
              });
    for (size_t i = 1; i < parts.size(); i++) parts[0].add_(parts[i]);
    if (call.inputs[6].defined()) parts[0].add_(call.inputs[6].view({1, -1, 1, 1}));
    return parts[0];
}

void BackwardCall::depthwise_moments(const BackwardSchedule& schedule, double* mean,
                                     double* squares) const {
    const BackwardSplit split = choose_moments_split(args, schedule);
    const int64_t channels = args.hidden_channels;
    std::vector<double> means(split.images * channels), sums(split.images * channels);
    const BackwardFn run = select_backward_kernel(kernel().name).run;
    run_tasks(split, backward_scratch(args, schedule, args.conv_project != nullptr),
              [&](int64_t images, int64_t hidden, float* scratch) {
                  const Moments own{&means[images * channels], &sums[images * channels]};
                  BackwardArgs with_own = args;
                  with_own.moments = &own;
                  const auto [image_begin, image_end] = part_of(args.N, images, split.images);
                  const auto [begin, end] = part_of(schedule.groups, hidden, split.hidden);
                  run(with_own, schedule, {}, image_begin, image_end, begin, end, nullptr, scratch);
              });
    double before = 0;
    for (int64_t images = 0; images < split.images; images++) {
        const auto [image_begin, image_end] = part_of(args.N, images, split.images);
        const auto pixels =
            static_cast<double>((image_end - image_begin) * args.H_out * args.W_out);
        merge_moments({&means[images * channels], &sums[images * channels]}, channels, pixels,
                      before, {mean, squares});
        before += pixels;
    }
}

namespace {

// Gradients of x, w_expand, b_expand, w_dw, b_dw, w_project, as far as they are wanted and exist.
// grad_y is the gradient of the result before clip_project and residual.
std::vector<at::Tensor> backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                     const OptionalTensor& w_expand, const OptionalTensor& b_expand,
                                     const at::Tensor& w_dw, const OptionalTensor& b_dw,
                                     const at::Tensor& w_project, int64_t stride,
                                     at::IntArrayRef padding, int64_t dilation,
                                     at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw,
                                     std::array<bool, kTensors> needs_grad) {
    const OptionalTensor no_bias;
    BackwardCall call(
        make_call({"inverted_residual", x, w_expand, b_expand, w_dw, b_dw, w_project, no_bias,
                   stride, padding, dilation, false, clip_expand, clip_dw, kUnbounded}));
    call.set_grad_y(grad_y);
    return call.gradients(choose_backward_schedule(call.args, kernel().lanes), needs_grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("inverted_residual_backward_cpu", &backward_cpu); }

}  // namespace mnv2::cpu
