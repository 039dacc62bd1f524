// A block of layers whose batch norms may use the statistics of the batch, as the ops for training
// get it.
#pragma once
#include <array>
#include <vector>

#include "batch_statistics.h"
#include "layers.h"
#include "ops_backward.h"

namespace mnv2::cpu {

using Tensors = std::vector<at::Tensor>;
using Live = std::array<bool, kStages>;

enum InStages { kExpand, kDepthwise, kProject };

// The stage with the statistics of the batch; the convolution's bias moves the mean.
void set_statistics(Stage& stage, const Statistics& found);

Stage without_affine(Stage stage);
Stage without_norm(Stage stage);

at::Tensor channels_last(const at::Tensor& tensor);
at::Tensor like(const at::Tensor& images);

// The block on its way through the op: its stages, and the weights that they are folded to.
struct TrainedBlock {
    std::array<Stage, kStages> stages;
    std::array<double, kStages> eps{};
    Live live;
    int64_t stride, dilation;
    at::IntArrayRef padding;
    at::ArrayRef<double> clip_expand, clip_dw;
    // Of what is folded: the scale of every output channel, and the bias.
    std::array<std::vector<float>, kStages> scales;
    std::array<OptionalTensor, kStages> biases;
    OptionalTensor w_dw;

    TrainedBlock(const c10::List<OptionalTensor>& layers, at::ArrayRef<double> eps_of,
                 const Live& live, int64_t stride, at::IntArrayRef padding, int64_t dilation,
                 at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw);

    bool expands() const { return stages[kExpand][kWeight].defined(); }
    bool is_live(InStages stage) const { return live[stage] && stages[stage][kWeight].defined(); }

    // A stage with a live norm as the convolution alone, without its bias but for the projection's:
    // the statistics are those of what it gives.
    Stage as_it_is(InStages stage) const;

    // What a stage is folded to.
    void fold(InStages which, const Stage& stage);

    // The op's call with folded weights.
    at::Tensor run(const at::Tensor& x) const;

    // The same call with the weights of the convolutions.
    BackwardCall call(const at::Tensor& x) const;

 private:
    OpArguments arguments(const at::Tensor& x, const OptionalTensor& w_expand,
                          const at::Tensor& w_project) const;
};

}  // namespace mnv2::cpu
