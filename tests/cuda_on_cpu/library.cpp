// One kernel for Python (helpers/emulated_cuda.py), which gives the name of its launcher as
// MNV2_RUN, and what is asked about all of them.
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/patch/plan.h"
#include "../../csrc/cuda/tile/plan.h"

using namespace mnv2::cuda;

namespace {

// As in Python, field by field.
struct PythonCall {
    int64_t N, H, W, H_out, W_out, in_channels, hidden_channels, out_channels;
    int64_t kernel_size, stride, dilation, pad_top, pad_left, expansion, residual, element;
    float clips[6];
    const void *x, *w_expand, *w_dw, *w_project;
    const float *b_expand, *b_dw, *b_project;
    void* y;

    Call call() const {
        Call to{};
        to.N = N, to.H = H, to.W = W, to.H_out = H_out, to.W_out = W_out;
        to.in_channels = in_channels, to.hidden_channels = hidden_channels;
        to.out_channels = out_channels;
        to.kernel_size = kernel_size, to.stride = stride, to.dilation = dilation;
        to.pad_top = pad_top, to.pad_left = pad_left;
        to.expansion = expansion != 0, to.residual = residual != 0;
        to.element = static_cast<mnv2::Element>(element);
        to.clip_expand = {clips[0], clips[1]};
        to.clip_dw = {clips[2], clips[3]};
        to.clip_project = {clips[4], clips[5]};
        to.x = x, to.w_expand = w_expand, to.w_dw = w_dw, to.w_project = w_project;
        to.b_expand = b_expand, to.b_dw = b_dw, to.b_project = b_project;
        to.y = y;
        return to;
    }
};

}  // namespace

extern "C" {

int mnv2_run(const PythonCall* call, int multiprocessors, int shared_bytes, int capability,
             int cluster) {
    return MNV2_RUN(call->call(), {multiprocessors, shared_bytes, capability, cluster}, nullptr);
}

int mnv2_choose(const PythonCall* from) {
    const Call call = from->call();
    return static_cast<int>(choose(call, call.element));
}

int mnv2_takes(int kernel, const PythonCall* from) {
    const Call call = from->call();
    switch (static_cast<Kernel>(kernel)) {
        case Kernel::patch:
            return patch_takes(call, call.element);
        case Kernel::tile:
            return tile_takes(call, call.element);
        case Kernel::generic:
            return true;
    }
    return false;
}

}  // extern "C"
