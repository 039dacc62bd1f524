#include "batch_statistics.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace mnv2::cpu {

at::Tensor floats(at::IntArrayRef sizes) {
    return at::empty(sizes, at::TensorOptions().dtype(at::kFloat));
}

std::vector<float> rounded(const Numbers& numbers) {
    std::vector<float> found(numbers.size());
    std::transform(numbers.begin(), numbers.end(), found.begin(),
                   [](double n) { return static_cast<float>(n); });
    return found;
}

Statistics statistics(const Rows& rows) {
    const int64_t channels = rows.channels;
    Statistics found{Numbers(channels), Numbers(channels)};
    Numbers means(kParts * channels), squares(kParts * channels);
    rows.each_part([&](int64_t part, int64_t first, int64_t count) {
        backward_kernel().add_moments(rows.begin + first * channels, count, channels, 0,
                                      {&means[part * channels], &squares[part * channels]});
    });
    int64_t before = 0;
    for (int64_t part = 0; part < kParts; part++) {
        const int64_t end = (part + 1) * rows.pixels / kParts;
        if (end == before) continue;
        merge_moments({&means[part * channels], &squares[part * channels]}, channels,
                      static_cast<double>(end - before), static_cast<double>(before),
                      {found.mean.data(), found.var.data()});
        before = end;
    }
    for (double& n : found.var) n /= static_cast<double>(rows.pixels);
    return found;
}

at::Tensor covariance(const Rows& rows, const float* mean) {
    const int64_t channels = rows.channels;
    const Numbers sums =
        rows.sums(channels * channels, [&](int64_t first, int64_t count, double* part) {
            std::vector<float> scratch(covariance_scratch(channels));
            backward_kernel().add_covariance(rows.begin + first * channels, count, channels, mean,
                                             part, scratch.data());
        });
    const at::Tensor found = floats({channels, channels});
    std::transform(sums.begin(), sums.end(), data(found), [&](double sum) {
        return static_cast<float>(sum / static_cast<double>(rows.pixels));
    });
    return found;
}

at::Tensor weight_times(const at::Tensor& weight, const at::Tensor& covariance) {
    const int64_t rows = weight.size(0), depth = weight.size(1);
    const at::Tensor found = floats({rows, depth});
    torch_threads(kParts).run(kParts, [&](int64_t part, int64_t) {
        const int64_t first = part * rows / kParts, end = (part + 1) * rows / kParts;
        backward_kernel().multiply(weight.const_data_ptr<float>() + first * depth,
                                   covariance.const_data_ptr<float>(), end - first, depth, depth,
                                   data(found) + first * depth);
    });
    return found;
}

Statistics of_convolution(const at::Tensor& weight, const Numbers& mean,
                          const at::Tensor& covariance) {
    const int64_t rows = weight.size(0), depth = weight.size(1);
    const at::Tensor product = weight_times(weight, covariance);
    const auto *w = weight.const_data_ptr<float>(), *t = product.const_data_ptr<float>();
    Statistics found{Numbers(rows, 0), Numbers(rows, 0)};
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < depth; j++, w++, t++) {
            found.mean[i] += static_cast<double>(*w) * mean[j];
            found.var[i] += static_cast<double>(*w) * static_cast<double>(*t);
        }
        found.var[i] = std::max(found.var[i], 0.0);
    }
    return found;
}

}  // namespace mnv2::cpu
