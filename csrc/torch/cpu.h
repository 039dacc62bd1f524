// What the ops on CPU tensors share: torch's choice of an instruction set, and its threads.
#pragma once
#include "../cpu/kernels.h"
#include "../cpu/threads.h"

namespace mnv2::cpu {

// The instruction set is torch's own choice, so ATEN_CPU_CAPABILITY steers both.
const Kernel& kernel();

// `count` of torch's threads, at most those that it has.
Threads torch_threads(int64_t count);

}  // namespace mnv2::cpu
