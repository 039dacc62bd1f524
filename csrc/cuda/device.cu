// What a launch needs to know of the current GPU.
#include <cuda_runtime_api.h>

#include "kernels.h"

namespace mnv2::cuda {

namespace {

// Compiled for the same GPUs as the kernels.
__global__ void probe() {}

// The largest clusters are of blocks that each have a multiprocessor's shared memory.
cudaError_t largest_cluster(Device& device) {
    device.cluster = 1;
    cudaFuncAttributes code{};
    cudaError_t error = cudaFuncGetAttributes(&code, probe);
    // A later GPU may run code that was compiled for one without clusters.
    if (error != cudaSuccess || device.capability < 90 || code.ptxVersion < 90) return error;
    error = cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.shared_bytes);
    for (int cluster = 8; error == cudaSuccess && cluster > 1 && device.cluster == 1; cluster--) {
        cudaLaunchAttribute dimension{};
        dimension.id = cudaLaunchAttributeClusterDimension;
        dimension.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(cluster));
        config.blockDim = dim3(256);
        config.dynamicSmemBytes = static_cast<size_t>(device.shared_bytes);
        config.attrs = &dimension;
        config.numAttrs = 1;
        int fit = 0;
        // An error says that this GPU, or this part of one, cannot place so large a cluster.
        if (cudaOccupancyMaxActiveClusters(&fit, probe, &config) != cudaSuccess) cudaGetLastError();
        if (fit > 0) device.cluster = cluster;
    }
    return error;
}

}  // namespace

cudaError_t describe(int index, Device& device) {
    const auto ask = [&](cudaDeviceAttr name, int& to) {
        return cudaDeviceGetAttribute(&to, name, index);
    };
    int major = 0, minor = 0;
    for (const cudaError_t error :
         {ask(cudaDevAttrMultiProcessorCount, device.multiprocessors),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes),
          ask(cudaDevAttrComputeCapabilityMajor, major),
          ask(cudaDevAttrComputeCapabilityMinor, minor)})
        if (error != cudaSuccess) return error;
    device.capability = 10 * major + minor;
    // There is no code for older ones.
    return device.capability < 80 ? cudaSuccess : largest_cluster(device);
}

}  // namespace mnv2::cuda
