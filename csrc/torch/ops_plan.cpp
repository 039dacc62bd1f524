// A whole network as one op on CPU tensors: mnv2::run_plan (mnv2_kernels/network/run_plan.py), and
// mnv2::run_plan_in, the same in memory of the caller.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "../cpu/sizes.h"
#include "cpu.h"
#include "host.h"
#include "program.h"

namespace mnv2::cpu {

namespace {

// Images whose classifier is computed at once, where memory is allocated for it.
constexpr int64_t kImagesAtOnce = 8;

struct PlanCall {
    Network network;
    Element element;
    at::Tensor x, y;

    int64_t images() const { return x.size(0); }
    int64_t arena_floats() const { return aligned_floats(network.arena * size_of(element)); }

    // Whole images by one thread each, while there are enough for all threads.
    int64_t whole_images(int64_t threads) const {
        return threads > 1 ? images() - images() % threads : 0;
    }
    // What the classifier reads of one image.
    int64_t feature_floats() const {
        return aligned_floats(classified_features(network.steps) * size_of(element));
    }
    // An arena and line buffers, and for `together` images what the classifier reads of them: one
    // of each for a thread alone.
    int64_t floats_of_task(int64_t threads, int64_t together) const {
        return arena_floats() + line_floats(network.steps, kernel().lanes, threads) +
               (together > 1 ? together * feature_floats() : 0);
    }
    // How many consecutive images share one pass over the classifier's weights.
    static int64_t together(int64_t images, bool at_once) {
        return at_once ? std::min(images, kImagesAtOnce) : 1;
    }
    // All that `threads` threads need besides x and y.
    int64_t floats(int64_t threads, bool at_once) const {
        const int64_t whole = whole_images(threads), rest = images() - whole;
        return std::max(
            whole > 0 ? threads * floats_of_task(1, together(whole / threads, at_once)) : 0,
            rest > 0 ? floats_of_task(threads, together(rest, at_once)) : 0);
    }
};

PlanCall make_plan_call(const at::Tensor& x, const WeightList& weights, at::IntArrayRef integers,
                        at::ArrayRef<double> bounds) {
    const std::optional<Element> element = element_of(x.scalar_type());
    TORCH_CHECK_TYPE(element.has_value(), "run_plan: x must be float32, bfloat16 or float16, got ",
                     x.scalar_type());
    Network network = read_network(integers, bounds, &weights, *element, kernel());
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == network.channels && x.size(2) == network.H &&
                          x.size(3) == network.W,
                      "run_plan: x must have shape (N, ", network.channels, ", ", network.H, ", ",
                      network.W, "), got ", x.sizes());
    check_memory("run_plan", "x", x);
    std::vector<int64_t> shape = network.y_shape;
    shape.insert(shape.begin(), x.size(0));
    auto options = x.options();
    if (shape.size() == 4) options = options.memory_format(at::MemoryFormat::ChannelsLast);
    PlanCall call{std::move(network), *element, x, at::empty(shape, options)};
    if (auto* stem = std::get_if<StemArgs>(&call.network.steps[0].layer)) {
        stem->channel_stride = x.stride(1), stem->row_stride = x.stride(2);
        stem->col_stride = x.stride(3);
    } else {
        call.x = x.contiguous(at::MemoryFormat::ChannelsLast);
    }
    return call;
}

// memory: call.floats(threads, at_once), 64-byte aligned. Each task has its own part of it,
// whichever thread runs it.
void run(const PlanCall& call, int64_t threads, bool at_once, float* memory) {
    const Network& network = call.network;
    const int64_t images = call.images(), whole = call.whole_images(threads);
    const int64_t size = size_of(call.element);
    const int64_t x_image = images > 1 ? size * call.x.stride(0) : 0;
    const int64_t y_image = size * call.y.numel() / images;
    const auto* const x = static_cast<const char*>(call.x.const_data_ptr());
    auto* const y = static_cast<char*>(call.y.mutable_data_ptr());
    at_once = at_once && classified_features(network.steps) > 0;
    const auto run_range = [&](int64_t begin, int64_t end, float* arena, const Threads& shared_by) {
        float* const lines = arena + call.arena_floats();
        float* const features = lines + line_floats(network.steps, kernel().lanes, shared_by.count);
        const int64_t step = PlanCall::together(end - begin, at_once);
        for (int64_t image = begin; image < end; image += step) {
            const char* const x_i = x + image * x_image;
            char* const y_i = y + image * y_image;
            if (step == 1)
                run_network(kernel(), network.steps, x_i, y_i, arena, lines, shared_by);
            else
                run_images(kernel(), network.steps, std::min(step, end - image), x_i, x_image, y_i,
                           features, arena, lines, shared_by);
        }
    };
    if (whole > 0) {
        const int64_t each = whole / threads;
        const int64_t of_task = call.floats_of_task(1, PlanCall::together(each, at_once));
        torch_threads(threads).run(threads, [&](int64_t task, int64_t) {
            run_range(task * each, (task + 1) * each, memory + task * of_task, torch_threads(1));
        });
    }
    run_range(whole, images, memory, torch_threads(threads));
}

at::Tensor run_plan(const at::Tensor& x, const WeightList& weights, at::IntArrayRef integers,
                    at::ArrayRef<double> bounds) {
    const PlanCall call = make_plan_call(x, weights, integers, bounds);
    if (call.images() == 0) return call.y;
    const int64_t threads = at::get_num_threads();
    const at::Tensor memory =
        at::empty({call.floats(threads, true)}, at::TensorOptions().dtype(at::kFloat));
    run(call, threads, true, memory.mutable_data_ptr<float>());
    return call.y;
}

bool shares_memory(const at::Tensor& a, const at::Tensor& b) {
    return a.has_storage() && b.has_storage() && a.storage().is_alias_of(b.storage());
}

at::Tensor run_plan_in(const at::Tensor& x, const at::Tensor& arena, const WeightList& weights,
                       at::IntArrayRef integers, at::ArrayRef<double> bounds) {
    TORCH_CHECK_VALUE(
        arena.is_cpu() && arena.scalar_type() == at::kByte && arena.is_contiguous() &&
            reinterpret_cast<uintptr_t>(arena.const_data_ptr()) % 64 == 0,
        "run_plan_in: arena must be contiguous uint8 on the CPU that begins at a multiple of 64"
        " bytes, got ",
        arena.scalar_type(), " of strides ", arena.strides(), " on ", arena.device());
    check_memory("run_plan_in", "arena", arena);
    TORCH_CHECK_VALUE(!shares_memory(arena, x), "run_plan_in: arena must not share memory with x");
    for (size_t i = 0; i < weights.size(); i++) {
        const std::optional<at::Tensor> weight = weights.get(i);
        TORCH_CHECK_VALUE(!weight.has_value() || !shares_memory(arena, *weight),
                          "run_plan_in: arena must not share memory with weights[", i, "]");
    }
    const PlanCall call = make_plan_call(x, weights, integers, bounds);
    if (call.images() == 0) return call.y;
    const int64_t floats = arena.numel() / static_cast<int64_t>(sizeof(float));
    int64_t threads = at::get_num_threads();
    while (threads > 1 && call.floats(threads, false) > floats) threads--;
    TORCH_CHECK_VALUE(call.floats(threads, false) <= floats,
                      "run_plan_in: arena must have at least ",
                      call.floats(threads, false) * sizeof(float), " bytes, got ", arena.numel());
    run(call, threads, false, static_cast<float*>(arena.mutable_data_ptr()));
    return call.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) {
    m.impl("run_plan", &run_plan);
    m.impl("run_plan_in", &run_plan_in);
}

}  // namespace mnv2::cpu
