// What Python calls (tests/emulated_cuda.py).
#include "../../csrc/cuda/kernels.h"
#include "emulator.h"

namespace {

using namespace mnv2::cuda;

#ifdef MNV2_HAS_PATCH
constexpr auto patch = run_patch;
#else
constexpr cudaError_t (*patch)(const Call&, const Device&, cudaStream_t) = nullptr;
#endif
#ifdef MNV2_HAS_TILE
constexpr auto tile = run_tile;
#else
constexpr cudaError_t (*tile)(const Call&, const Device&, cudaStream_t) = nullptr;
#endif
#ifdef MNV2_HAS_GENERIC
constexpr auto generic = run_generic;
#else
constexpr cudaError_t (*generic)(const Call&, const Device&, cudaStream_t) = nullptr;
#endif

}  // namespace

extern "C" {

// The structs of Python, field by field.
struct PythonCall {
    int64_t N, H, W, H_out, W_out, in_channels, hidden_channels, out_channels;
    int64_t kernel, stride, dilation, pad_top, pad_left, expansion, residual, element;
    float clips[6];
    const void *x, *w_expand, *w_dw, *w_project;
    const float *b_expand, *b_dw, *b_project;
    void* y;
};

void mnv2_configure(int schedule, uint32_t seed, int tracking, int shared_bytes, int capability) {
    emulator::configure(
        {static_cast<emulator::Schedule>(schedule), seed, tracking != 0, shared_bytes, capability});
}

const char* mnv2_message() { return emulator::message(); }

void mnv2_counts(int64_t* to) {
    const emulator::Counts& counts = emulator::counts();
    to[0] = counts.blocks, to[1] = counts.block_barriers;
    to[2] = counts.matrices, to[3] = counts.passes;
}

// `kernel`: of enum Kernel.
int mnv2_run(int kernel, const PythonCall* from, int multiprocessors, int shared_bytes,
             int capability) {
    Call call{};
    call.N = from->N, call.H = from->H, call.W = from->W;
    call.H_out = from->H_out, call.W_out = from->W_out;
    call.in_channels = from->in_channels, call.hidden_channels = from->hidden_channels;
    call.out_channels = from->out_channels;
    call.kernel = from->kernel, call.stride = from->stride, call.dilation = from->dilation;
    call.pad_top = from->pad_top, call.pad_left = from->pad_left;
    call.expansion = from->expansion != 0, call.residual = from->residual != 0;
    call.clip_expand = {from->clips[0], from->clips[1]};
    call.clip_dw = {from->clips[2], from->clips[3]};
    call.clip_project = {from->clips[4], from->clips[5]};
    call.element = static_cast<Element>(from->element);
    call.x = from->x, call.w_expand = from->w_expand, call.w_dw = from->w_dw;
    call.w_project = from->w_project;
    call.b_expand = from->b_expand, call.b_dw = from->b_dw, call.b_project = from->b_project;
    call.y = from->y;
    const Device device{multiprocessors, shared_bytes, capability};
    constexpr cudaError_t (*kernels[])(const Call&, const Device&, cudaStream_t) = {patch, tile,
                                                                                    generic};
    if (kernels[kernel] == nullptr) return cudaErrorInvalidDeviceFunction;
    return kernels[kernel](call, device, nullptr);
}

}  // extern "C"
