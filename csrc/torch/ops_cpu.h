// The op on CPU tensors.
#pragma once
#include "host.h"

namespace mnv2::cpu {

at::Tensor run_op(const OpArguments& arguments);

}  // namespace mnv2::cpu
