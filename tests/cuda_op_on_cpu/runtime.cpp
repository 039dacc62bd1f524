// What csrc/torch/ops_cuda.cpp asks of CUDA's runtime, for a GPU that helpers/emulated_cuda.py
// emulates.
#include "../../csrc/cuda/kernels.h"

namespace {

int capability = 90, questions = 0;

}  // namespace

namespace mnv2::cuda {

cudaError_t describe(int, Device& device) {
    questions++;
    device = {132, 227 << 10, capability};
    return capability == 0 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

}  // namespace mnv2::cuda

extern "C" {

// 0: a GPU that the build has no code for.
void mnv2_set_capability(int value) { capability = value; }

// How often the GPU was asked what it is.
int mnv2_questions() { return questions; }

const char* cudaGetErrorString(cudaError_t) { return "said by the emulator"; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

}  // extern "C"
