// Whether a call of fused layers is one for inference that nobody but the caller sees. All of this
// is one question: code and data of each that Python asks of torch have left the caches while
// layers ran.
#pragma once
#include <pybind11/pybind11.h>

namespace mnv2 {

// x is a torch.Tensor or nn.Parameter itself: dense, on the CPU, of four dimensions and of a dtype
// that the kernels take. No gradient is wanted of it; there is no autocast for the CPU, transform
// of functions, dispatch mode or recording of torch.jit.trace, and no mode that sees functions but
// those of the class `harmless`.
bool is_plain_call(const pybind11::handle& x, const pybind11::handle& harmless);

}  // namespace mnv2
