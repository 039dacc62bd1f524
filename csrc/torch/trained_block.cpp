#include "trained_block.h"

#include <ATen/ops/empty.h>

#include "ops_cpu.h"

namespace mnv2::cpu {

void set_statistics(Stage& stage, const Statistics& found) {
    Numbers mean = numbers(stage[kBias], static_cast<int64_t>(found.mean.size()), 0);
    for (size_t i = 0; i < mean.size(); i++) mean[i] += found.mean[i];
    stage[kMean] = vector_of(mean, at::kDouble), stage[kVar] = vector_of(found.var, at::kDouble);
}

Stage without_affine(Stage stage) {
    stage[kGamma] = stage[kBeta] = at::Tensor();
    return stage;
}

Stage without_norm(Stage stage) {
    stage[kGamma] = stage[kBeta] = stage[kMean] = stage[kVar] = at::Tensor();
    return stage;
}

at::Tensor channels_last(const at::Tensor& tensor) {
    return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor like(const at::Tensor& images) {
    return at::empty(images.sizes(), images.options(), at::MemoryFormat::ChannelsLast);
}

TrainedBlock::TrainedBlock(const c10::List<OptionalTensor>& layers, at::ArrayRef<double> eps_of,
                           const Live& live, int64_t stride, at::IntArrayRef padding,
                           int64_t dilation, at::ArrayRef<double> clip_expand,
                           at::ArrayRef<double> clip_dw)
    : live(live),
      stride(stride),
      dilation(dilation),
      padding(padding),
      clip_expand(clip_expand),
      clip_dw(clip_dw) {
    TORCH_CHECK_VALUE(layers.size() == kStages * kOfStage && eps_of.size() == kStages,
                      "inverted_residual: 18 tensors of layers and three eps belong together");
    for (size_t i = 0; i < kStages; i++) {
        stages[i] = stage_of(layers, i), eps[i] = eps_of[i];
        if (stages[i][kWeight].defined()) stages[i][kWeight] = checked_weight(stages[i][kWeight]);
    }
}

Stage TrainedBlock::as_it_is(InStages stage) const {
    if (!is_live(stage)) return stages[stage];
    Stage plain = without_norm(stages[stage]);
    if (stage != kProject) plain[kBias] = at::Tensor();
    return plain;
}

void TrainedBlock::fold(InStages which, const Stage& stage) {
    if (!stage[kWeight].defined()) return;
    const Norm norm(stage, eps[which]);
    biases[which] = folded_bias(stage, norm);
    scales[which] = rounded(norm.scale);
    if (which != kDepthwise) return;
    Tensors found;
    cpu::fold(stage, eps[which], found);
    w_dw = found[0];
}

at::Tensor TrainedBlock::run(const at::Tensor& x) const {
    const auto folded = [this](InStages which, const Stage& stage) {
        Tensors found;
        if (stage[kWeight].defined()) cpu::fold(stage, eps[which], found);
        return found.empty() ? OptionalTensor() : OptionalTensor(found[0]);
    };
    const OptionalTensor w_expand = folded(kExpand, stages[kExpand]);
    return run_op(arguments(x, w_expand, *folded(kProject, as_it_is(kProject))));
}

BackwardCall TrainedBlock::call(const at::Tensor& x) const {
    const auto matrix = [this](InStages which) {
        const at::Tensor& weight = stages[which][kWeight];
        return weight.view({weight.size(0), weight.size(1)}).t();
    };
    const OptionalTensor w_expand = expands() ? OptionalTensor(matrix(kExpand)) : OptionalTensor();
    BackwardCall found(checked_call(arguments(x, w_expand, matrix(kProject))));
    const auto weight = [this](InStages which) {
        return stages[which][kWeight].const_data_ptr<float>();
    };
    if (expands()) found.args.conv_expand = weight(kExpand);
    found.args.scale_expand = scales[kExpand].data();
    found.args.conv_project = weight(kProject);
    found.args.scale_project = scales[kProject].data();
    return found;
}

OpArguments TrainedBlock::arguments(const at::Tensor& x, const OptionalTensor& w_expand,
                                    const at::Tensor& w_project) const {
    return {"inverted_residual",
            x,
            w_expand,
            biases[kExpand],
            *w_dw,
            biases[kDepthwise],
            w_project,
            biases[kProject],
            stride,
            padding,
            dilation,
            false,
            clip_expand,
            clip_dw,
            kUnbounded};
}

}  // namespace mnv2::cpu
