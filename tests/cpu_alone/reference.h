// The layers in float64, written as their definitions.
#pragma once
#include <cmath>

#include "../../csrc/cpu/network.h"
#include "numbers.h"

struct Image {
    int64_t H, W, channels;
    Numbers at;  // (H, W, channels)

    double get(int64_t y, int64_t x, int64_t c) const {
        const bool inside = y >= 0 && y < H && x >= 0 && x < W;
        return inside ? at[(y * W + x) * channels + c] : 0.0;
    }
};

// Weights as float64; a bias that is not there is empty.
struct Weights {
    Numbers expand, b_expand, dw, b_dw, project, b_project;
    Numbers squeeze, b_squeeze, excite, b_excite;
};

inline double clipped(double value, mnv2::Clip clip) {
    if (std::isnan(value)) return value;
    return std::fmin(std::fmax(value, clip.lower), clip.upper);
}

inline double activated(double value, const mnv2::Activation& activation) {
    switch (activation.curve) {
        case mnv2::Curve::clip:
            return clipped(value, activation.clip);
        case mnv2::Curve::hardswish:
            return value * clipped(value + 3, {0, 6}) / 6;
        case mnv2::Curve::silu:
            return value / (1 + std::exp(-value));
        case mnv2::Curve::gelu:
            return value * std::erfc(-value / std::sqrt(2.0)) / 2;
        case mnv2::Curve::gelu_tanh:
            break;
    }
    const double inner = std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value);
    return value * (1 + std::tanh(inner)) / 2;
}

inline double bias_of(const Numbers& bias, int64_t i) { return bias.empty() ? 0.0 : bias[i]; }

// A convolution of each pixel: weight (C_in, C_out).
inline Image pointwise(const Image& x, const Numbers& weight, const Numbers& bias, int64_t channels,
                       const mnv2::Activation& activation) {
    Image y{x.H, x.W, channels, Numbers(x.H * x.W * channels)};
    for (int64_t p = 0; p < x.H * x.W; p++)
        for (int64_t n = 0; n < channels; n++) {
            double sum = bias_of(bias, n);
            for (int64_t k = 0; k < x.channels; k++)
                sum += x.at[p * x.channels + k] * weight[k * channels + n];
            y.at[p * channels + n] = activated(sum, activation);
        }
    return y;
}

inline Image expansion(const mnv2::BlockArgs& s, const Weights& w, const Image& x) {
    if (!s.expansion) return x;
    return pointwise(x, w.expand, w.b_expand, s.hidden_channels, s.after_expand());
}

inline Image depthwise(const mnv2::BlockArgs& s, const Weights& w, const Image& h) {
    Image d{s.H_out, s.W_out, s.hidden_channels, Numbers(s.H_out * s.W_out * s.hidden_channels)};
    for (int64_t y = 0; y < s.H_out; y++)
        for (int64_t x_out = 0; x_out < s.W_out; x_out++)
            for (int64_t c = 0; c < s.hidden_channels; c++) {
                double sum = bias_of(w.b_dw, c);
                for (int64_t i = 0; i < s.kernel_size * s.kernel_size; i++) {
                    const int64_t row = y * s.stride + i / s.kernel_size * s.dilation - s.pad_top;
                    const int64_t col =
                        x_out * s.stride + i % s.kernel_size * s.dilation - s.pad_left;
                    sum += h.get(row, col, c) * w.dw[i * s.hidden_channels + c];
                }
                d.at[(y * s.W_out + x_out) * s.hidden_channels + c] = activated(sum, s.after_dw());
            }
    return d;
}

// A convolution of all channels in place of expansion and depthwise.
inline Image dense(const mnv2::BlockArgs& s, const Weights& w, const Image& x) {
    Image d{s.H_out, s.W_out, s.hidden_channels, Numbers(s.H_out * s.W_out * s.hidden_channels)};
    const int64_t k = s.kernel_size, channels = x.channels, hidden = s.hidden_channels;
    for (int64_t y = 0; y < s.H_out; y++)
        for (int64_t x_out = 0; x_out < s.W_out; x_out++) {
            double* const sums = &d.at[(y * s.W_out + x_out) * hidden];
            for (int64_t c = 0; c < hidden; c++) sums[c] = bias_of(w.b_dw, c);
            for (int64_t i = 0; i < k * k * channels; i++) {
                const int64_t tap = i / channels;
                const double value = x.get(y * s.stride + tap / k - s.pad_top,
                                           x_out * s.stride + tap % k - s.pad_left, i % channels);
                for (int64_t c = 0; c < hidden; c++) sums[c] += value * w.dw[i * hidden + c];
            }
            for (int64_t c = 0; c < hidden; c++) sums[c] = activated(sums[c], s.after_dw());
        }
    return d;
}

// To 8 bits of mantissa, to nearest even.
inline double rounded_to_bfloat16(double value) {
    if (!std::isfinite(value)) return value;
    int exponent;
    const double mantissa = std::frexp(value, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

inline Image mean(const Image& x) {
    Image y{1, 1, x.channels, Numbers(x.channels)};
    for (int64_t c = 0; c < x.channels; c++) {
        for (int64_t p = 0; p < x.H * x.W; p++) y.at[c] += x.at[p * x.channels + c];
        y.at[c] /= static_cast<double>(x.H * x.W);
    }
    return y;
}

// Of every channel of d.
inline Image gate(const mnv2::GateArgs& g, const Weights& w, const Image& d) {
    constexpr mnv2::Activation kNone{mnv2::Curve::clip, {-INFINITY, INFINITY}};
    const Image squeezed = pointwise(mean(d), w.squeeze, w.b_squeeze, g.width, g.squeeze);
    Image y = pointwise(squeezed, w.excite, w.b_excite, d.channels, kNone);
    for (double& value : y.at)
        value = g.hard ? clipped(value + 3, {0, 6}) / 6 : 1 / (1 + std::exp(-value));
    return y;
}

// With s.pairs the projection multiplies bfloat16 numbers, to which the depthwise's are
// rounded.
inline Image block(const mnv2::BlockArgs& s, const Weights& w, const Image& x) {
    Image d = s.dense ? dense(s, w, x) : depthwise(s, w, expansion(s, w, x));
    for (double& value : d.at)
        if (s.pairs) value = rounded_to_bfloat16(value);
    if (s.gate.width > 0) {
        const Image factors = gate(s.gate, w, d);
        for (size_t i = 0; i < d.at.size(); i++) d.at[i] *= factors.at[i % d.channels];
    }
    Image y = pointwise(d, w.project, w.b_project, s.out_channels, s.after_project());
    for (size_t i = 0; s.residual && i < y.at.size(); i++) y.at[i] += x.at[i];
    return y;
}

// The gradient goes through where the clipped value is inside the bounds.
inline double through(mnv2::Clip clip, double value, double gradient) {
    return value > clip.lower && value < clip.upper ? gradient : 0;
}

// Gradients of x and the weights of a block. The functions below add to what is there of weights
// and biases, and overwrite that of x.
struct BlockGradients {
    Numbers x, expand, b_expand, dw, b_dw, project;
};

// Returns the gradient of d.
inline Numbers project_backward(const mnv2::BlockArgs& s, const Weights& w, const Image& d,
                                const Numbers& grad_y, BlockGradients& sums) {
    const int64_t hidden = s.hidden_channels, out = s.out_channels;
    Numbers grad_d(d.at.size());
    for (int64_t pixel = 0; pixel < s.H_out * s.W_out; pixel++)
        for (int64_t c = 0; c < hidden; c++)
            for (int64_t n = 0; n < out; n++) {
                const double grad = grad_y[pixel * out + n];
                grad_d[pixel * hidden + c] += grad * w.project[c * out + n];
                sums.project[c * out + n] += d.at[pixel * hidden + c] * grad;
            }
    return grad_d;
}

// Returns the gradient of h.
inline Numbers depthwise_backward(const mnv2::BlockArgs& s, const Weights& w, const Image& h,
                                  const Numbers& grad_d, BlockGradients& sums) {
    const int64_t hidden = s.hidden_channels;
    Numbers grad_h(h.at.size());
    for (int64_t pixel = 0; pixel < s.H_out * s.W_out; pixel++)
        for (int64_t i = 0; i < s.kernel_size * s.kernel_size; i++) {
            const int64_t row =
                pixel / s.W_out * s.stride + i / s.kernel_size * s.dilation - s.pad_top;
            const int64_t col =
                pixel % s.W_out * s.stride + i % s.kernel_size * s.dilation - s.pad_left;
            if (row < 0 || row >= s.H || col < 0 || col >= s.W) continue;
            for (int64_t c = 0; c < hidden; c++) {
                const double grad = grad_d[pixel * hidden + c];
                sums.dw[i * hidden + c] += h.get(row, col, c) * grad;
                grad_h[(row * s.W + col) * hidden + c] += w.dw[i * hidden + c] * grad;
            }
        }
    return grad_h;
}

inline void expand_backward(const mnv2::BlockArgs& s, const Weights& w, const Image& x,
                            const Numbers& grad_h, BlockGradients& sums) {
    const int64_t hidden = s.hidden_channels, in = s.in_channels;
    sums.x.assign(x.at.size(), 0);
    for (int64_t pixel = 0; pixel < s.H * s.W; pixel++)
        for (int64_t c = 0; c < hidden; c++) {
            const double grad = grad_h[pixel * hidden + c];
            for (int64_t k = 0; k < in; k++) {
                sums.expand[k * hidden + c] += x.at[pixel * in + k] * grad;
                sums.x[pixel * in + k] += w.expand[k * hidden + c] * grad;
            }
        }
}

// Of one image; grad_y is that of the projection's result.
inline void add_gradients(const mnv2::BlockArgs& s, const Weights& w, const Image& x,
                          const Numbers& grad_y, BlockGradients& sums) {
    const auto mask = [](mnv2::Clip clip, const Image& values, Numbers& grads, Numbers& bias) {
        for (size_t i = 0; i < grads.size(); i++) {
            grads[i] = through(clip, values.at[i], grads[i]);
            bias[i % values.channels] += grads[i];
        }
    };
    const Image h = expansion(s, w, x), d = depthwise(s, w, h);
    Numbers grads = project_backward(s, w, d, grad_y, sums);
    mask(s.clip_dw, d, grads, sums.b_dw);
    grads = depthwise_backward(s, w, h, grads, sums);
    if (!s.expansion) {
        sums.x = grads;
        return;
    }
    mask(s.clip_expand, h, grads, sums.b_expand);
    expand_backward(s, w, x, grads, sums);
}

// 3x3, stride 2; weight (column, row, C_in, C_out).
inline Image stem(const mnv2::cpu::StemArgs& s, const Numbers& weight, const Numbers& bias,
                  const Image& x) {
    Image y{s.H_out, s.W_out, s.out_channels, Numbers(s.H_out * s.W_out * s.out_channels)};
    for (int64_t i = 0; i < s.H_out * s.W_out; i++)
        for (int64_t n = 0; n < s.out_channels; n++) {
            double sum = bias_of(bias, n);
            for (int64_t tap = 0; tap < 9; tap++)
                for (int64_t c = 0; c < s.in_channels; c++)
                    sum += x.get(i / s.W_out * 2 + tap % 3 - s.pad_top,
                                 i % s.W_out * 2 + tap / 3 - s.pad_left, c) *
                           weight[(tap * s.in_channels + c) * s.out_channels + n];
            y.at[i * s.out_channels + n] = activated(sum, s.activation);
        }
    return y;
}

// weight (C_out, C_in).
inline Image linear(const Image& x, const Numbers& weight, const Numbers& bias, int64_t features,
                    const mnv2::Activation& activation) {
    Image y{1, 1, features, Numbers(features)};
    for (int64_t n = 0; n < features; n++) {
        y.at[n] = bias_of(bias, n);
        for (int64_t k = 0; k < x.channels; k++) y.at[n] += x.at[k] * weight[n * x.channels + k];
        y.at[n] = activated(y.at[n], activation);
    }
    return y;
}
