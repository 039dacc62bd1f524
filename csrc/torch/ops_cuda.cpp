// The op on CUDA tensors: one launch on the current stream, which can be captured in a CUDA graph.
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "../cuda/kernels.h"
#include "host.h"

namespace mnv2::cuda {

namespace {

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
    TORCH_CHECK(error == cudaSuccess, "inverted_residual: CUDA cannot tell what device ", device,
                " is: ", cudaGetErrorString(error));
    return value;
}

// Asked once a device.
const Device& device_facts(int device) {
    static std::mutex mutex;
    static std::map<int, Device> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    Device facts{};
    facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                       attribute(cudaDevAttrComputeCapabilityMinor, device);
    return known.emplace(device, facts).first->second;
}

// A view may start anywhere in its storage; the allocator's own tensors start at multiples of 512.
at::Tensor aligned(const at::Tensor& tensor) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    return is_aligned ? tensor : tensor.clone();
}

at::Tensor inverted_residual(const at::Tensor& x, const OptionalTensor& w_expand,
                             const OptionalTensor& b_expand, const at::Tensor& w_dw,
                             const OptionalTensor& b_dw, const at::Tensor& w_project,
                             const OptionalTensor& b_project, int64_t stride,
                             at::IntArrayRef padding, int64_t dilation, bool residual,
                             at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw,
                             at::ArrayRef<double> clip_project) {
    const c10::DeviceGuard guard(x.device());
    mnv2::Call host = make_call(x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, stride,
                                padding, dilation, residual, clip_expand, clip_dw, clip_project);
    Call call{};
    static_cast<BlockSizes&>(call) = host.sizes;
    const std::optional<Element> element = element_of(x.scalar_type());
    TORCH_CHECK_TYPE(element.has_value(),
                     "inverted_residual: x must be float32, float16 or bfloat16 for the CUDA "
                     "kernels, got ",
                     x.scalar_type(), "; backend='reference' takes any floating dtype");
    call.element = *element;
    if (call.N == 0) return host.y;
    const c10::DeviceIndex index = host.y.device().index();
    const Device& device = device_facts(index);
    TORCH_CHECK(device.capability >= 80,
                "inverted_residual: x must be on a GPU of compute capability 8.0 or later, got ",
                device.capability / 10, ".", device.capability % 10);

    // What is copied here is freed for later work of this stream only.
    const auto pointer = [&](size_t i) -> const void* {
        at::Tensor& tensor = host.inputs[i];
        if (!tensor.defined()) return nullptr;
        tensor = aligned(tensor);
        return tensor.const_data_ptr();
    };
    const auto bias = [&](size_t i) {
        if (host.inputs[i].defined()) host.inputs[i] = host.inputs[i].to(at::kFloat);
        return static_cast<const float*>(pointer(i));
    };
    call.x = pointer(0);
    call.w_expand = pointer(1), call.b_expand = bias(2);
    call.w_dw = pointer(3), call.b_dw = bias(4);
    call.w_project = pointer(5), call.b_project = bias(6);
    call.y = host.y.mutable_data_ptr();

    const Kernel kernel = choose(call, call.element);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(index);
    const cudaError_t error = run(kernel, call, device, stream);
    if (error != cudaSuccess) {
        cudaGetLastError();  // Else the next call of anyone would be blamed for it.
        TORCH_CHECK(false, "inverted_residual: the CUDA kernel ", name(kernel),
                    " was not launched for x of shape ", x.sizes(), ", ", call.hidden_channels,
                    " hidden channels, kernel size ", call.kernel, ", stride ", call.stride, ": ",
                    cudaGetErrorString(error));
    }
    return host.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CUDA, m) { m.impl("inverted_residual", &inverted_residual); }

}  // namespace mnv2::cuda
