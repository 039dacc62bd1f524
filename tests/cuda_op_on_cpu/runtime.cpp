// What csrc/torch/ops_cuda.cpp asks of CUDA's runtime, for a GPU that helpers/emulated_cuda.py
// emulates.
#include <cuda_runtime_api.h>

namespace {

int capability = 90, questions = 0;

}  // namespace

extern "C" {

void mnv2_set_capability(int value) { capability = value; }

// How often an attribute was asked for.
int mnv2_questions() { return questions; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
    questions++;
    switch (name) {
        case cudaDevAttrMultiProcessorCount:
            *value = 132;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 227 << 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = capability / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = capability % 10;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}

const char* cudaGetErrorString(cudaError_t) { return "said by the emulator"; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

}  // extern "C"
