// Stands in for PyTorch's header where there is no CUDA to have streams.
#pragma once
#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream(DeviceIndex) { return nullptr; }

}  // namespace c10::cuda
