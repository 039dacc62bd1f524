// A whole network as one op: mnv2::run_plan (mnv2_kernels/plan.py) on CPU tensors.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "host.h"
#include "program.h"

namespace mnv2::cpu {

namespace {

at::Tensor run_plan(const at::Tensor& x_, const WeightList& weights, at::IntArrayRef integers,
                    at::ArrayRef<double> bounds) {
    static const Kernel& kernel = select_kernel(at::get_cpu_capability().c_str());
    const std::optional<Element> element = element_of(x_.scalar_type());
    TORCH_CHECK_TYPE(element.has_value(), "run_plan: x must be float32, bfloat16 or float16, got ",
                     x_.scalar_type());
    Network network = read_network(integers, bounds, &weights, *element, kernel);
    TORCH_CHECK_VALUE(x_.dim() == 4 && x_.size(1) == network.channels && x_.size(2) == network.H &&
                          x_.size(3) == network.W,
                      "run_plan: x must have shape (N, ", network.channels, ", ", network.H, ", ",
                      network.W, "), got ", x_.sizes());
    at::Tensor x = x_;
    std::vector<int64_t> shape = network.y_shape;
    shape.insert(shape.begin(), x.size(0));
    auto options = x.options();
    if (shape.size() == 4) options = options.memory_format(at::MemoryFormat::ChannelsLast);
    const at::Tensor y = at::empty(shape, options);
    if (x.size(0) == 0) return y;
    if (auto* stem = std::get_if<StemArgs>(&network.steps[0].layer)) {
        stem->channel_stride = x.stride(1), stem->row_stride = x.stride(2);
        stem->col_stride = x.stride(3);
    } else {
        x = x.contiguous(at::MemoryFormat::ChannelsLast);
    }
    const int64_t size = size_of(*element);
    const int64_t x_image = x.size(0) > 1 ? size * x.stride(0) : 0;
    const int64_t y_image = size * y.numel() / y.size(0);
    const auto* const x_data = static_cast<const char*>(x.const_data_ptr());
    auto* const y_data = static_cast<char*>(y.mutable_data_ptr());

    const int64_t threads = at::get_num_threads(), images = x.size(0);
    // Whole images by one thread each, while there are enough for all threads.
    const int64_t whole = threads > 1 ? images - images % threads : 0;
    const int64_t lines = line_floats(network.steps, kernel.lanes, 1);
    const int64_t arena_floats = (network.arena * size + 63) / 64 * 16;  // whole cache lines
    const int64_t of_thread = arena_floats + lines;
    const int64_t shared = arena_floats + line_floats(network.steps, kernel.lanes, threads);
    const at::Tensor memory =
        at::empty({std::max(whole > 0 ? threads * of_thread : 0, whole < images ? shared : 0)},
                  at::TensorOptions().dtype(at::kFloat));
    auto* const arena = memory.mutable_data_ptr<float>();

    const Threads alone{1, [](int64_t count, const auto& task) {
                            for (int64_t i = 0; i < count; i++) task(i, 0);
                        }};
    at::parallel_for(0, whole, 1, [&](int64_t begin, int64_t end) {
        float* const own = arena + at::get_thread_num() * of_thread;
        for (int64_t image = begin; image < end; image++)
            run_network(kernel, network.steps, x_data + image * x_image, y_data + image * y_image,
                        own, own + arena_floats, alone);
    });
    const Threads all{threads, [](int64_t count, const auto& task) {
                          at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                              for (int64_t i = begin; i < end; i++) task(i, at::get_thread_num());
                          });
                      }};
    for (int64_t image = whole; image < images; image++)
        run_network(kernel, network.steps, x_data + image * x_image, y_data + image * y_image,
                    arena, arena + arena_floats, threads > 1 ? all : alone);
    return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("run_plan", &run_plan); }

}  // namespace mnv2::cpu
