#include "host.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include <cmath>

namespace mnv2 {

namespace {

constexpr const char* kNames[] = {"x",         "w_expand",  "b_expand",  "w_dw",
                                  "b_dw",      "w_project", "b_project", "w_squeeze",
                                  "b_squeeze", "w_excite",  "b_excite"};

// Shapes in the words of Python: (1, 2) and (3,).
std::string shape(const at::Tensor& tensor) {
    std::string text = "(";
    for (int64_t i = 0; i < tensor.dim(); i++)
        text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + (tensor.dim() == 1 ? ",)" : ")");
}

void check_dtypes(const char* op, const std::array<at::Tensor, 11>& tensors) {
    const at::Tensor& x = tensors[0];
    for (size_t i = 0; i < tensors.size(); i++) {
        const at::Tensor& t = tensors[i];
        if (!t.defined()) continue;
        TORCH_CHECK_TYPE(t.is_floating_point() && t.layout() == at::kStrided, op, ": ", kNames[i],
                         " must be a dense floating-point tensor, got ", t.scalar_type(), " ",
                         t.layout());
        const bool is_bias = kNames[i][0] == 'b';
        TORCH_CHECK_TYPE(
            t.scalar_type() == x.scalar_type() || (is_bias && t.scalar_type() == at::kFloat), op,
            ": ", kNames[i], " must have the dtype of x, ", x.scalar_type(), ", got ",
            t.scalar_type());
        TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", kNames[i],
                          " must be on the device of x, ", x.device(), ", got ", t.device());
        check_memory(op, kNames[i], t);
    }
}

Clip checked_clip(const char* op, const char* name, at::ArrayRef<double> clip) {
    TORCH_CHECK_VALUE(clip.size() == 2 && clip[0] <= clip[1], op, ": ", name,
                      " must be (lower, upper) with lower <= upper, got ", clip);
    return {static_cast<float>(clip[0]), static_cast<float>(clip[1])};
}

void check_bias(const char* op, const char* name, const at::Tensor& bias, const char* letter,
                int64_t channels) {
    TORCH_CHECK_VALUE(!bias.defined() || (bias.dim() == 1 && bias.size(0) == channels), op, ": ",
                      name, " must have shape (", letter, "=", channels, ",), got ", shape(bias));
}

// What follows each of the three layers, in place of the clips.
void read_curves(const OpArguments& op, Call& call) {
    constexpr auto kLast = static_cast<int64_t>(Curve::gelu_tanh);
    if (op.curves.empty()) return;
    bool known = op.curves.size() == 4;
    for (const int64_t curve : op.curves) known = known && curve >= 0 && curve <= kLast;
    TORCH_CHECK_VALUE(known, op.op, ": curves must be 4 integers from 0 to ", kLast, ", got ",
                      op.curves);
    for (size_t i = 0; i < call.curves.size(); i++)
        call.curves[i] = static_cast<Curve>(op.curves[i]);
    constexpr Clip kNone{-INFINITY, INFINITY};
    BlockSizes& sizes = call.sizes;
    if (call.curves[0] != Curve::clip) sizes.clip_expand = kNone;
    if (call.curves[1] != Curve::clip) sizes.clip_dw = kNone;
    if (call.curves[2] != Curve::clip) sizes.clip_project = kNone;
}

void check_gate(const OpArguments& op, const Call& call) {
    const at::Tensor &w_squeeze = call.inputs[7], &w_excite = call.inputs[9];
    if (!w_squeeze.defined()) {
        for (size_t i = 8; i < call.inputs.size(); i++)
            TORCH_CHECK_VALUE(!call.inputs[i].defined(), op.op, ": ", kNames[i],
                              " must be None where w_squeeze is None");
        return;
    }
    const int64_t hidden = call.sizes.hidden_channels;
    TORCH_CHECK_VALUE(w_squeeze.dim() == 2 && w_squeeze.size(0) == hidden && w_squeeze.size(1) > 0,
                      op.op, ": w_squeeze must have shape (C_hidden=", hidden,
                      ", R) with R at least 1, got ", shape(w_squeeze));
    const int64_t width = w_squeeze.size(1);
    TORCH_CHECK_VALUE(w_excite.defined() && w_excite.dim() == 2 && w_excite.size(0) == width &&
                          w_excite.size(1) == hidden,
                      op.op, ": w_excite must have shape (R=", width, ", C_hidden=", hidden,
                      "), got ", w_excite.defined() ? shape(w_excite) : "None");
    check_bias(op.op, "b_squeeze", call.inputs[8], "R", width);
    check_bias(op.op, "b_excite", call.inputs[10], "C_hidden", hidden);
}

void read_gate(const OpArguments& op, Call& call) {
    TORCH_CHECK_VALUE(op.scale == 0 || op.scale == 1, op.op, ": scale must be 0 or 1, got ",
                      op.scale);
    if (!call.inputs[7].defined()) return;
    call.gate.width = call.inputs[7].size(1);
    call.gate.squeeze = {static_cast<Curve>(op.curves[3]),
                         checked_clip(op.op, "squeeze", op.clip_squeeze)};
    call.gate.hard = op.scale == 1;
}

}  // namespace

std::optional<Element> element_of(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat:
            return Element::single;
        case at::kBFloat16:
            return Element::bfloat16;
        case at::kHalf:
            return Element::half;
        default:
            return std::nullopt;
    }
}

Element checked_element(const char* op, const at::Tensor& x, const char* kernels) {
    const std::optional<Element> element = element_of(x.scalar_type());
    TORCH_CHECK_TYPE(element.has_value(), op, ": x must be float32, float16 or bfloat16 for the ",
                     kernels, ", got ", x.scalar_type(),
                     "; backend='reference' takes any floating dtype");
    return *element;
}

void check_memory(const char* op, const std::string& name, const at::Tensor& tensor) {
    const size_t needed = at::detail::computeStorageNbytes(
        tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
    const size_t allocated = tensor.storage().nbytes();
    TORCH_CHECK_VALUE(tensor.numel() == 0 || needed <= allocated, op, ": ", name,
                      " must lie inside its storage, which has been resized to ", allocated,
                      " bytes of ", needed);
}

int64_t output_size(int64_t size, int64_t kernel_size, int64_t stride, int64_t pad,
                    int64_t dilation) {
    const int64_t room = size + pad - dilation * (kernel_size - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

Call checked_call(const OpArguments& op) {
    const auto or_undefined = [](const OptionalTensor& t) { return t ? *t : at::Tensor(); };
    Call call{{op.x, or_undefined(op.w_expand), or_undefined(op.b_expand), op.w_dw,
               or_undefined(op.b_dw), op.w_project, or_undefined(op.b_project)},
              {},
              {},
              {},
              {}};
    if (op.gate)
        call.inputs[7] = or_undefined(op.gate->w_squeeze),
        call.inputs[8] = or_undefined(op.gate->b_squeeze),
        call.inputs[9] = or_undefined(op.gate->w_excite),
        call.inputs[10] = or_undefined(op.gate->b_excite);
    const at::Tensor &x = call.inputs[0], &w_expand = call.inputs[1], &b_expand = call.inputs[2],
                     &w_dw = call.inputs[3], &b_dw = call.inputs[4], &w_project = call.inputs[5],
                     &b_project = call.inputs[6], &w_squeeze = call.inputs[7];
    BlockSizes& sizes = call.sizes;

    check_dtypes(op.op, call.inputs);
    TORCH_CHECK_VALUE(x.dim() == 4, op.op, ": x must have shape (N, C_in, H, W), got ", shape(x));
    sizes.N = x.size(0), sizes.in_channels = x.size(1), sizes.H = x.size(2), sizes.W = x.size(3);
    sizes.dense = op.gate && w_dw.dim() == 4;
    const bool is_square = (w_dw.dim() == 3 || sizes.dense) && w_dw.size(0) == w_dw.size(1);
    const int64_t kernel_size = is_square ? w_dw.size(0) : 0;
    const bool known = op.gate ? is_known_window(kernel_size, 1, sizes.dense)
                               : kernel_size == 3 || kernel_size == 5;
    TORCH_CHECK_VALUE(known, op.op, ": w_dw must have shape (k, k, C_hidden) with k ",
                      op.gate ? "3, 5 or 7, or (k, k, C_in, C_hidden) with k 1, 3 or 5" : "3 or 5",
                      ", got ", shape(w_dw));
    sizes.kernel_size = kernel_size, sizes.hidden_channels = w_dw.size(-1);
    sizes.expansion = w_expand.defined();
    if (sizes.dense) {
        TORCH_CHECK_VALUE(!w_expand.defined() && !b_expand.defined(), op.op,
                          ": w_expand and b_expand must be None where w_dw has four dimensions");
        TORCH_CHECK_VALUE(w_dw.size(2) == sizes.in_channels, op.op, ": w_dw must have shape (",
                          kernel_size, ", ", kernel_size, ", C_in=", sizes.in_channels,
                          ", C_hidden), got ", shape(w_dw));
        TORCH_CHECK_VALUE(!w_squeeze.defined(), op.op,
                          ": w_squeeze must be None where w_dw has four dimensions");
        TORCH_CHECK_VALUE(op.dilation == 1, op.op,
                          ": dilation must be 1 where w_dw has four dimensions, got ", op.dilation);
    } else if (!sizes.expansion) {
        TORCH_CHECK_VALUE(!b_expand.defined(), op.op,
                          ": b_expand must be None where w_expand is None");
        TORCH_CHECK_VALUE(sizes.hidden_channels == sizes.in_channels, op.op,
                          ": w_dw must have shape (", sizes.kernel_size, ", ", sizes.kernel_size,
                          ", C_in=", sizes.in_channels, ") where w_expand is None, got ",
                          shape(w_dw));
    } else {
        TORCH_CHECK_VALUE(w_expand.dim() == 2 && w_expand.size(0) == sizes.in_channels &&
                              w_expand.size(1) == sizes.hidden_channels,
                          op.op, ": w_expand must have shape (C_in=", sizes.in_channels,
                          ", C_hidden=", sizes.hidden_channels, "), got ", shape(w_expand));
    }
    TORCH_CHECK_VALUE(w_project.dim() == 2 && w_project.size(0) == sizes.hidden_channels, op.op,
                      ": w_project must have shape (C_hidden=", sizes.hidden_channels,
                      ", C_out), got ", shape(w_project));
    sizes.out_channels = w_project.size(1);
    TORCH_CHECK_VALUE(sizes.in_channels > 0 && sizes.hidden_channels > 0 && sizes.out_channels > 0,
                      op.op,
                      ": every channel count must be at least 1, got C_in=", sizes.in_channels,
                      ", C_hidden=", sizes.hidden_channels, ", C_out=", sizes.out_channels);
    check_bias(op.op, "b_expand", b_expand, "C_hidden", sizes.hidden_channels);
    check_bias(op.op, "b_dw", b_dw, "C_hidden", sizes.hidden_channels);
    check_bias(op.op, "b_project", b_project, "C_out", sizes.out_channels);
    check_gate(op, call);
    TORCH_CHECK_VALUE(op.stride == 1 || op.stride == 2, op.op, ": stride must be 1 or 2, got ",
                      op.stride);
    if (op.gate && !sizes.dense) {
        TORCH_CHECK_VALUE(is_known_window(kernel_size, op.dilation, false), op.op,
                          ": dilation must be from 1 to ", kMaxExtent / (kernel_size - 1),
                          " where k is ", kernel_size, ", got ", op.dilation);
    } else {
        TORCH_CHECK_VALUE(op.dilation == 1 || op.dilation == 2, op.op,
                          ": dilation must be 1 or 2, got ", op.dilation);
    }
    sizes.stride = op.stride, sizes.dilation = op.dilation;
    const at::IntArrayRef padding = op.padding;
    const int64_t extent = op.dilation * (sizes.kernel_size - 1);
    bool padding_fits = padding.size() == 4;
    for (const int64_t pad : padding) padding_fits = padding_fits && pad >= 0 && pad <= extent;
    TORCH_CHECK_VALUE(padding_fits, op.op,
                      ": padding must be 4 integers (top, left, bottom, right) "
                      "from 0 to ",
                      extent, ", got ", padding);
    sizes.pad_top = padding[0], sizes.pad_left = padding[1];
    sizes.H_out =
        output_size(sizes.H, sizes.kernel_size, op.stride, padding[0] + padding[2], op.dilation);
    sizes.W_out =
        output_size(sizes.W, sizes.kernel_size, op.stride, padding[1] + padding[3], op.dilation);
    TORCH_CHECK_VALUE(sizes.H >= 1 && sizes.W >= 1 && sizes.H_out >= 1 && sizes.W_out >= 1, op.op,
                      ": x must be large enough for one output row and column, "
                      "got ",
                      sizes.H, "x", sizes.W, " with padding ", padding);
    sizes.clip_expand = checked_clip(op.op, "clip_expand", op.clip_expand);
    sizes.clip_dw = checked_clip(op.op, "clip_dw", op.clip_dw);
    sizes.clip_project = checked_clip(op.op, "clip_project", op.clip_project);
    TORCH_CHECK_VALUE(!op.residual || (sizes.out_channels == sizes.in_channels &&
                                       sizes.H_out == sizes.H && sizes.W_out == sizes.W),
                      op.op, ": residual needs x and the result to have one shape, got ", shape(x),
                      " and (", sizes.N, ", ", sizes.out_channels, ", ", sizes.H_out, ", ",
                      sizes.W_out, ")");
    sizes.residual = op.residual;
    read_curves(op, call);
    read_gate(op, call);
    return call;
}

Call make_call(const OpArguments& op) {
    Call call = checked_call(op);
    auto& [x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, w_squeeze, b_squeeze, w_excite,
           b_excite] = call.inputs;
    const BlockSizes& sizes = call.sizes;
    x = x.contiguous(at::MemoryFormat::ChannelsLast);
    for (at::Tensor* weight : {&w_expand, &w_dw, &w_project, &w_squeeze, &w_excite})
        if (weight->defined()) *weight = weight->contiguous();
    for (at::Tensor* bias : {&b_expand, &b_dw, &b_project, &b_squeeze, &b_excite})
        if (bias->defined()) *bias = bias->contiguous().to(at::kFloat);
    call.y = at::empty({sizes.N, sizes.out_channels, sizes.H_out, sizes.W_out},
                       x.options().memory_format(at::MemoryFormat::ChannelsLast));
    return call;
}

}  // namespace mnv2
