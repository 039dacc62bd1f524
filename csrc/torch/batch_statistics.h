// Statistics of a batch: sums over all pixels of images, to the same bits at any number of threads.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu.h"
#include "layers.h"

namespace mnv2::cpu {

// Ranges of pixels (or channels) that are summed apart.
constexpr int64_t kParts = 8;

// Rows of channels, one a pixel, and the sums over them.
struct Rows {
    const float* begin;
    int64_t pixels, channels;

    explicit Rows(const at::Tensor& images)
        : begin(images.const_data_ptr<float>()),
          pixels(images.size(0) * images.size(2) * images.size(3)),
          channels(images.size(1)) {}

    // run(part, first pixel, pixels) for all parts, on torch's threads.
    template <class Run>
    void each_part(const Run& run) const {
        torch_threads(kParts).run(kParts, [&](int64_t part, int64_t) {
            const int64_t first = part * pixels / kParts;
            run(part, first, (part + 1) * pixels / kParts - first);
        });
    }

    // Sums of `size` doubles; run(first pixel, pixels, sums) adds to those of a part.
    template <class Run>
    Numbers sums(int64_t size, const Run& run) const {
        Numbers parts(kParts * size, 0);
        each_part([&](int64_t part, int64_t first, int64_t count) {
            run(first, count, &parts[part * size]);
        });
        for (int64_t i = size; i < kParts * size; i++) parts[i % size] += parts[i];
        parts.resize(size);
        return parts;
    }
};

// Means of channels and their biased variances.
struct Statistics {
    Numbers mean, var;
};

Statistics statistics(const Rows& rows);

// (channels, channels), float32, around the mean.
at::Tensor covariance(const Rows& rows, const float* mean);

// W C: (hidden channels, channels), of a weight (hidden channels, channels, 1, 1).
at::Tensor weight_times(const at::Tensor& weight, const at::Tensor& covariance);

// Of what a 1x1 convolution without a bias gives, from the mean and the covariance of its input.
Statistics of_convolution(const at::Tensor& weight, const Numbers& mean,
                          const at::Tensor& covariance);

at::Tensor floats(at::IntArrayRef sizes);

inline float* data(const at::Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

std::vector<float> rounded(const Numbers& numbers);

}  // namespace mnv2::cpu
