#include "plain_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

namespace mnv2 {
namespace {

bool is_taken(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
}

bool transforms_functions() {
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    return included.has_any(c10::DispatchKeySet{c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                                c10::DispatchKey::FuncTorchDynamicLayerBackMode});
}

bool has_function_modes_but(const pybind11::handle& harmless) {
    using Modes = at::impl::PythonTorchFunctionTLS;
    for (int64_t i = 0; i < Modes::stack_len(); i++) {
        PyObject* const mode = Modes::get_stack_at(i)->ptr(getPyInterpreter());
        if (!PyObject_TypeCheck(mode, reinterpret_cast<PyTypeObject*>(harmless.ptr()))) return true;
    }
    return false;
}

}  // namespace

bool is_plain_call(const pybind11::handle& x, const pybind11::handle& harmless) {
    if (!THPVariable_CheckExact(x.ptr())) return false;
    const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
    return tensor.device().is_cpu() && tensor.layout() == at::kStrided && tensor.dim() == 4 &&
           is_taken(tensor.scalar_type()) &&
           !(c10::GradMode::is_enabled() && tensor.requires_grad()) &&
           !at::autocast::is_autocast_enabled(at::kCPU) && !transforms_functions() &&
           c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
           !at::tracer::impl::is_dispatch_enabled() && !has_function_modes_but(harmless);
}

}  // namespace mnv2
