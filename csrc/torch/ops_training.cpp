// The forward pass of a block whose batch norms use the statistics of the batch, float32 on the
// CPU: nothing of hidden channels x pixels is ever whole.
//
// The expansion is linear, so that its batch mean and variance follow from the mean m and the
// covariance C of x: mean1 = W1 m, var1 = diag(W1 C W1').
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "trained_block.h"

namespace mnv2::cpu {

namespace {

// What a live norm computes with in a forward pass, and the statistics that it finds.
struct Forward {
    std::vector<float> gamma, beta;
    Statistics found;
    ForwardNorm norm;

    Forward(const Stage& stage, double eps)
        : gamma(rounded(numbers(stage[kGamma], stage[kWeight].size(0), 1))),
          beta(rounded(numbers(stage[kBeta], stage[kWeight].size(0), 0))),
          found{Numbers(gamma.size()), Numbers(gamma.size())},
          norm{gamma.data(), beta.data(), eps, found.mean.data(), found.var.data()} {}
};

at::Tensor project_whole_batch(TrainedBlock& block, const BackwardCall& call,
                               const BackwardSchedule& schedule) {
    std::array<std::optional<Forward>, 2> norms;
    for (const InStages stage : {kExpand, kDepthwise})
        if (block.is_live(stage)) norms[stage].emplace(block.stages[stage], block.eps[stage]);
    const auto norm = [&](InStages stage) { return norms[stage] ? &norms[stage]->norm : nullptr; };
    const at::Tensor projected = call.train(schedule, norm(kExpand), norm(kDepthwise));
    for (const InStages stage : {kExpand, kDepthwise})
        if (norms[stage]) set_statistics(block.stages[stage], norms[stage]->found);
    return projected;
}

// Statistics first, then the op as in inference; sets mean and covariance of x.
at::Tensor project_by_bands(TrainedBlock& block, const at::Tensor& x,
                            const BackwardSchedule& schedule, at::Tensor& x_mean,
                            at::Tensor& x_covariance) {
    if (block.is_live(kExpand)) {
        Stage& stage = block.stages[kExpand];
        const Rows rows(x);
        const Statistics of_x = statistics(rows);
        x_mean = vector_of(of_x.mean, at::kFloat);
        x_covariance = covariance(rows, x_mean.const_data_ptr<float>());
        set_statistics(stage, of_convolution(stage[kWeight], of_x.mean, x_covariance));
        block.fold(kExpand, stage);
    }
    if (block.is_live(kDepthwise)) {
        Stage& stage = block.stages[kDepthwise];
        const BackwardCall call = block.call(x);
        Statistics found{Numbers(call.args.hidden_channels), Numbers(call.args.hidden_channels)};
        call.depthwise_moments(schedule, found.mean.data(), found.var.data());
        const auto pixels = static_cast<double>(call.args.N * call.args.H_out * call.args.W_out);
        for (double& n : found.var) n /= pixels;
        set_statistics(stage, found);
        block.fold(kDepthwise, stage);
    }
    return block.run(x);
}

// y, what the projection gives, mean and covariance of x, then mean and biased variance of every
// stage (float64); empty: not there.
Tensors train_forward(const at::Tensor& x_given, const c10::List<OptionalTensor>& layers,
                      at::ArrayRef<double> eps, Live live, int64_t stride, at::IntArrayRef padding,
                      int64_t dilation, bool residual, at::ArrayRef<double> clip_expand,
                      at::ArrayRef<double> clip_dw) {
    TrainedBlock block(layers, eps, live, stride, padding, dilation, clip_expand, clip_dw);
    const at::Tensor x = channels_last(x_given), none = at::empty({0}, at::kFloat);
    Tensors found(4 + 2 * kStages, none);
    block.fold(kExpand, block.as_it_is(kExpand));
    block.fold(kDepthwise, block.as_it_is(kDepthwise));
    block.fold(kProject, block.as_it_is(kProject));
    const BackwardCall call = block.call(x);
    const BackwardSchedule schedule = choose_training_schedule(call.args, kernel().lanes);
    const at::Tensor projected = schedule.whole_batch
                                     ? project_whole_batch(block, call, schedule)
                                     : project_by_bands(block, x, schedule, found[2], found[3]);
    if (!live[kProject]) {
        found[0] = residual ? projected.add(x) : projected;
    } else {
        const Rows rows(projected);
        const Statistics of_rows = statistics(rows);
        Stage& stage = block.stages[kProject];
        stage[kMean] = vector_of(of_rows.mean, at::kDouble),
        stage[kVar] = vector_of(of_rows.var, at::kDouble);
        const Norm norm(stage, eps[kProject]);
        const std::vector<float> mean = rounded(of_rows.mean), scale = rounded(norm.scale),
                                 beta = rounded(numbers(stage[kBeta], rows.channels, 0));
        found[0] = like(projected), found[1] = projected;
        rows.each_part([&](int64_t, int64_t first, int64_t count) {
            const int64_t at = first * rows.channels;
            backward_kernel().normalize(
                rows.begin + at, count, rows.channels, {mean.data(), scale.data(), beta.data()},
                residual ? x.const_data_ptr<float>() + at : nullptr, data(found[0]) + at);
        });
    }
    for (size_t i = 0; i < kStages; i++)
        if (block.is_live(static_cast<InStages>(i)))
            found[4 + 2 * i] = block.stages[i][kMean], found[5 + 2 * i] = block.stages[i][kVar];
    return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("inverted_residual_training_cpu", &train_forward); }

}  // namespace mnv2::cpu
