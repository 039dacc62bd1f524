// The op on CPU tensors: scratch for torch's threads, and one call of the kernel.
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
#include "host.h"

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

at::Tensor run_op(const OpArguments& arguments) {
    Call call = make_call(arguments);
    const Element element = checked_element(arguments.x, "CPU kernel");
    if (call.sizes.N == 0) return call.y;
    BlockStep block{};
    static_cast<BlockSizes&>(block.args) = call.sizes;
    block.args.element = element;
    block.args.pairs = kernel().multiplies_pairs(block.args);
    call.set_weights(block.args);
    block.schedule = choose_schedule(block.args, kernel().lanes);
    print_once(block);

    const int64_t floats = scratch_layout(block.args, block.schedule, kernel().lanes).total;
    const int64_t threads = at::get_num_threads();
    const at::Tensor memory = at::empty({threads * floats}, at::TensorOptions().dtype(at::kFloat));
    run_block(kernel(), block, call.pointer(0), call.y.mutable_data_ptr(),
              {memory.mutable_data_ptr<float>(), floats}, torch_threads(threads));
    return call.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("inverted_residual", &inverted_residual<run_op>); }

}  // namespace mnv2::cpu
