// The op on CUDA tensors: one launch on the current stream, which can be captured in a CUDA graph.
#include "ops_cuda.h"

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

struct Facts {
    Device device{};
    cudaError_t error;
};

bool says_no_code(cudaError_t error) {
    return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
           error == cudaErrorUnsupportedPtxVersion;
}

// Of the current GPU, asked once.
const Facts& facts_of(c10::DeviceIndex index) {
    static std::mutex mutex;
    static std::map<int, Facts> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(index);
    if (found != known.end()) return found->second;
    Facts facts{};
    facts.error = describe(index, facts.device);
    if (facts.error != cudaSuccess) cudaGetLastError();  // Else the next call is blamed for it.
    // Other errors, as of a GPU without free memory, may be gone at the next call.
    TORCH_CHECK(facts.error == cudaSuccess || says_no_code(facts.error),
                "inverted_residual: CUDA cannot tell what GPU ", static_cast<int>(index),
                " is: ", cudaGetErrorString(facts.error));
    return known.emplace(index, facts).first->second;
}

const Device& checked_device(c10::DeviceIndex index) {
    const Facts& facts = facts_of(index);
    const Device& device = facts.device;
    TORCH_CHECK(device.capability >= 80 || facts.error != cudaSuccess,
                "inverted_residual: x must be on a GPU of compute capability 8.0 or later, got ",
                device.capability / 10, ".", device.capability % 10);
    TORCH_CHECK(facts.error == cudaSuccess, "inverted_residual: the CUDA kernels of this build do ",
                "not run on GPU ", static_cast<int>(index), ": ", cudaGetErrorString(facts.error));
    return device;
}

// A view may start anywhere in its storage; the allocator's own tensors start at multiples of 512.
at::Tensor aligned(const at::Tensor& tensor) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    return is_aligned ? tensor : tensor.clone();
}

at::Tensor run_op(const OpArguments& arguments) {
    const at::Tensor& x = arguments.x;
    const c10::DeviceGuard guard(x.device());
    mnv2::Call host = make_call(arguments);
    Call call{};
    static_cast<BlockSizes&>(call) = host.sizes;
    call.element = checked_element(arguments.op, x, "CUDA kernels");
    if (call.N == 0) return host.y;
    const c10::DeviceIndex index = host.y.device().index();
    const Device& device = checked_device(index);

    // What is copied here is freed for later work of this stream only.
    for (at::Tensor& input : host.inputs)
        if (input.defined()) input = aligned(input);
    host.set_weights(call);
    call.x = host.pointer(0);
    call.y = host.y.mutable_data_ptr();

    const Kernel kernel = choose(call, call.element);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(index);
    const cudaError_t error = run(kernel, call, device, stream);
    if (error != cudaSuccess) {
        cudaGetLastError();  // Else the next call of anyone would be blamed for it.
        TORCH_CHECK(false, "inverted_residual: the CUDA kernel ", name(kernel),
                    " was not launched for x of shape ", x.sizes(), ", ", call.hidden_channels,
                    " hidden channels, kernel size ", call.kernel_size, ", stride ", call.stride,
                    ": ", cudaGetErrorString(error));
    }
    return host.y;
}

}  // namespace

bool runs_on_gpu(int number) {
    const auto index = static_cast<c10::DeviceIndex>(number);
    const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index));
    return facts_of(index).error == cudaSuccess;
}

TORCH_LIBRARY_IMPL(mnv2, CUDA, m) { m.impl("inverted_residual", &inverted_residual<run_op>); }

}  // namespace mnv2::cuda
