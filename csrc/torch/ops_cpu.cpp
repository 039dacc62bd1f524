// The op on CPU tensors: scratch for torch's threads, and one call of the kernel.
#include "ops_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

#include "../cpu/run_block.h"
#include "cpu.h"

namespace mnv2::cpu {

namespace {

// MNV2_PRINT_CONFIGS=1: the schedule of every new shape, once, on stderr.
void print_once(const BlockStep& block) {
    static const char* variable = std::getenv("MNV2_PRINT_CONFIGS");
    static const bool enabled = variable != nullptr && variable[0] == '1';
    if (!enabled) return;
    static std::mutex mutex;
    static std::set<std::string> printed;
    const std::string line = to_string(block.args, block.schedule, kernel().lanes);
    const std::lock_guard<std::mutex> lock(mutex);
    if (printed.insert(line).second)
        std::fprintf(stderr, "mnv2 %s %s\n", kernel().name, line.c_str());
}

}  // namespace

at::Tensor run_op(const OpArguments& arguments) {
    Call call = make_call(arguments);
    const Element element = checked_element(arguments.op, arguments.x, "CPU kernel");
    if (call.sizes.N == 0) return call.y;
    BlockStep block{};
    static_cast<BlockSizes&>(block.args) = call.sizes;
    block.args.element = element;
    call.set_weights(block.args);
    call.set_gate(block.args);
    block.args.pairs = kernel().multiplies_pairs(block.args);
    block.schedule = choose_schedule(block.args, kernel().lanes);
    print_once(block);

    const int64_t floats = scratch_layout(block.args, block.schedule, kernel().lanes).total;
    const int64_t threads = at::get_num_threads();
    const int64_t kept = kept_floats(block, kernel().lanes, threads);
    const at::Tensor memory =
        at::empty({threads * floats + kept}, at::TensorOptions().dtype(at::kFloat));
    auto* const begin = memory.mutable_data_ptr<float>();
    run_block(kernel(), block, call.pointer(0), call.y.mutable_data_ptr(), {begin, floats},
              begin + threads * floats, torch_threads(threads));
    return call.y;
}

namespace {

// mnv2_kernels/ops/mbconv.py. bounds: of the clips after expansion, depthwise, projection, squeeze.
at::Tensor mbconv(const at::Tensor& x, const OptionalTensor& w_expand,
                  const OptionalTensor& b_expand, const at::Tensor& w_dw,
                  const OptionalTensor& b_dw, const at::Tensor& w_project,
                  const OptionalTensor& b_project, const OptionalTensor& w_squeeze,
                  const OptionalTensor& b_squeeze, const OptionalTensor& w_excite,
                  const OptionalTensor& b_excite, int64_t stride, at::IntArrayRef padding,
                  int64_t dilation, bool residual, at::IntArrayRef curves,
                  at::ArrayRef<double> bounds, int64_t scale) {
    bool are_pairs = bounds.size() == 8;
    for (size_t i = 0; i + 1 < bounds.size(); i += 2)
        are_pairs = are_pairs && bounds[i] <= bounds[i + 1];
    TORCH_CHECK_VALUE(
        are_pairs, "mbconv: bounds must be 4 times lower, upper with lower <= upper, got ", bounds);
    const GateTensors gate{w_squeeze, b_squeeze, w_excite, b_excite};
    return run_op({"mbconv", x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, stride,
                   padding, dilation, residual, bounds.slice(0, 2), bounds.slice(2, 2),
                   bounds.slice(4, 2), curves, &gate, bounds.slice(6, 2), scale});
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) {
    m.impl("inverted_residual", &inverted_residual<run_op>);
    m.impl("mbconv", &mbconv);
}

}  // namespace mnv2::cpu
