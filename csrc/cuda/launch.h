// From the host to a kernel, and nothing but that: <<< >>> is written nowhere else, so that a host
// compiler can build the launchers too (tests/cuda_on_cpu).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
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

// Runs `kernel` on a stream of the current device. Synchronises nothing and allocates nothing, so
// it can be captured in a CUDA graph.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, const Device& device,
                   cudaStream_t stream, Arguments&&... arguments) {
    if (grid.blocks < 1 || grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (grid.shared_bytes > 48 << 10) {
        // Always the same limit: another thread may be about to launch with more than this one.
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
        if (error != cudaSuccess) return error;
    }
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
