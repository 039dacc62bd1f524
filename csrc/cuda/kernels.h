// The functions that launch the kernels on a stream of the current GPU. They check nothing,
// allocate nothing and wait for nothing; sizes.N is at least 1.
#pragma once
#include <cuda_runtime_api.h>

#include "call.h"
#include "choose.h"

namespace mnv2::cuda {

// What a launch needs to know of the current GPU, which has this index. An error where this build
// has no code for it.
cudaError_t describe(int index, Device& device);

cudaError_t run_patch(const Call& call, const Device& device, cudaStream_t stream);
cudaError_t run_tile(const Call& call, const Device& device, cudaStream_t stream);
cudaError_t run_generic(const Call& call, const Device& device, cudaStream_t stream);

inline cudaError_t run(Kernel kernel, const Call& call, const Device& device, cudaStream_t stream) {
    switch (kernel) {
        case Kernel::patch:
            return run_patch(call, device, stream);
        case Kernel::tile:
            return run_tile(call, device, stream);
        case Kernel::generic:
            return run_generic(call, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace mnv2::cuda
