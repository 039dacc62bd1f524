// From the host to a kernel, and nothing but that: <<< >>> is written nowhere else, so that a host
// compiler can build the launchers too (tests/cuda_on_cpu).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <set>
#include <utility>

#include "call.h"

namespace mnv2::cuda {

struct Grid {
    int64_t blocks;    // along x, the only direction without a small limit
    int threads;       // a block
    int shared_bytes;  // of dynamic shared memory a block
    int cluster = 1;   // blocks that can read one another's shared memory (capability 9.0)
};

}  // namespace mnv2::cuda

#ifndef __CUDACC__
#include "launch_on_cpu.h"
#else
namespace mnv2::cuda {

// Lets blocks of the kernel have all the shared memory there is, and asks for as little of the
// first cache: plans count on several blocks on a multiprocessor. Once a kernel and GPU, always to
// the same limit: another thread may be about to launch with more than this one.
inline cudaError_t allow_shared_memory(const void* kernel, const Device& device) {
    using KernelOnGpu = std::pair<const void*, int>;
    thread_local std::set<KernelOnGpu> done;
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error != cudaSuccess || done.count({kernel, index}) > 0) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.shared_bytes);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) done.insert({kernel, index});
    return error;
}

// Runs `kernel` on a stream of the current device. Synchronises nothing and allocates nothing, so
// it can be captured in a CUDA graph.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, const Device& device,
                   cudaStream_t stream, Arguments&&... arguments) {
    if (grid.blocks < 1 || grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const auto* address = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared_memory(address, device);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace mnv2::cuda
#endif
