// A block whose batch norms use the statistics of the batch, in float64.
#pragma once
#include "reference.h"

using Images = std::vector<Image>;

// Of every channel, over all pixels of all images: mean and biased variance.
struct Statistics {
    Numbers mean, var;
};

inline double pixels_of(const Images& images) {
    return static_cast<double>(images.size()) * static_cast<double>(images[0].H * images[0].W);
}

inline Statistics statistics(const Images& images) {
    const int64_t channels = images[0].channels;
    Statistics found{Numbers(channels), Numbers(channels)};
    const double pixels = pixels_of(images);
    const auto each = [&](const auto& visit) {
        for (const Image& image : images)
            for (size_t i = 0; i < image.at.size(); i++) visit(i % channels, image.at[i]);
    };
    each([&](size_t c, double value) { found.mean[c] += value / pixels; });
    each([&](size_t c, double value) {
        found.var[c] += (value - found.mean[c]) * (value - found.mean[c]) / pixels;
    });
    return found;
}

// z = gamma v + beta; z = v where they are empty.
struct Scaled {
    Numbers gamma, beta;

    bool there() const { return !gamma.empty(); }
    double of(size_t channel, double v) const {
        return there() ? gamma[channel] * v + beta[channel] : v;
    }
};

inline Images clipped(const Images& v, const Scaled& scaled, mnv2::Clip clip) {
    Images found = v;
    for (Image& image : found)
        for (size_t i = 0; i < image.at.size(); i++)
            image.at[i] = clipped(scaled.of(i % image.channels, image.at[i]), clip);
    return found;
}

inline mnv2::BlockArgs without_clips(mnv2::BlockArgs args) {
    args.clip_expand = args.clip_dw = {-INFINITY, INFINITY};
    return args;
}

// Gradients of all images' x and of the weights, and (2, hidden_channels) sums over the batch: of
// the gradient of z, and of that times v.
struct TrainingGradients {
    BlockGradients of_block;
    Numbers sums_expand, sums_dw;
};

// From the gradient of clip(z) to that of v. The mean of v and its deviation are those of the
// batch where it is scaled; otherwise v depends on its own pixel alone.
inline void norm_backward(const Images& v, const Scaled& scaled, mnv2::Clip clip,
                          std::vector<Numbers>& grads, Numbers& sums) {
    const size_t channels = v[0].channels;
    const double pixels = pixels_of(v);
    sums.assign(2 * channels, 0);
    for (size_t n = 0; n < v.size(); n++)
        for (size_t i = 0; i < grads[n].size(); i++) {
            const size_t c = i % channels;
            const double value = v[n].at[i];
            grads[n][i] = through(clip, scaled.of(c, value), grads[n][i]);
            sums[c] += grads[n][i], sums[channels + c] += grads[n][i] * value;
        }
    if (!scaled.there()) return;
    for (size_t n = 0; n < v.size(); n++)
        for (size_t i = 0; i < grads[n].size(); i++) {
            const size_t c = i % channels;
            const double shared = sums[c] + v[n].at[i] * sums[channels + c];
            grads[n][i] = scaled.gamma[c] * (grads[n][i] - shared / pixels);
        }
}

// `sums` begins as zeros. The weights before a norm give what is normalised already; gradients of
// biases are those of stages without one.
inline void training_gradients(const mnv2::BlockArgs& args, const Weights& w,
                               const Scaled& scaled_expand, const Scaled& scaled_dw,
                               const Images& images, std::vector<Numbers> grads,
                               TrainingGradients& sums) {
    const mnv2::BlockArgs s = without_clips(args);
    BlockGradients& block = sums.of_block;
    Images v_expand, v_dw;
    for (const Image& x : images) v_expand.push_back(expansion(s, w, x));
    const Images h = s.expansion ? clipped(v_expand, scaled_expand, args.clip_expand) : v_expand;
    for (const Image& of_image : h) v_dw.push_back(depthwise(s, w, of_image));
    const Images d = clipped(v_dw, scaled_dw, args.clip_dw);

    for (size_t n = 0; n < images.size(); n++)
        grads[n] = project_backward(s, w, d[n], grads[n], block);
    norm_backward(v_dw, scaled_dw, args.clip_dw, grads, sums.sums_dw);
    for (size_t n = 0; n < images.size(); n++)
        grads[n] = depthwise_backward(s, w, h[n], grads[n], block);
    if (s.expansion)
        norm_backward(v_expand, scaled_expand, args.clip_expand, grads, sums.sums_expand);
    Numbers of_x;
    for (size_t n = 0; n < images.size(); n++) {
        block.x = grads[n];
        if (s.expansion) expand_backward(s, w, images[n], grads[n], block);
        of_x.insert(of_x.end(), block.x.begin(), block.x.end());
    }
    block.x = of_x;
    const auto biases = [](const Numbers& of_stage, const Scaled& scaled) {
        if (scaled.there()) return Numbers();
        return Numbers(of_stage.begin(), of_stage.begin() + of_stage.size() / 2);
    };
    block.b_expand = biases(sums.sums_expand, scaled_expand);
    block.b_dw = biases(sums.sums_dw, scaled_dw);
}
