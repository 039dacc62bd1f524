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
};

inline double clipped(double value, mnv2::Clip clip) {
    if (std::isnan(value)) return value;
    return std::fmin(std::fmax(value, clip.lower), clip.upper);
}

inline double bias_of(const Numbers& bias, int64_t i) { return bias.empty() ? 0.0 : bias[i]; }

// A convolution of each pixel: weight (C_in, C_out).
inline Image pointwise(const Image& x, const Numbers& weight, const Numbers& bias, int64_t channels,
                       mnv2::Clip clip) {
    Image y{x.H, x.W, channels, Numbers(x.H * x.W * channels)};
    for (int64_t p = 0; p < x.H * x.W; p++)
        for (int64_t n = 0; n < channels; n++) {
            double sum = bias_of(bias, n);
            for (int64_t k = 0; k < x.channels; k++)
                sum += x.at[p * x.channels + k] * weight[k * channels + n];
            y.at[p * channels + n] = clipped(sum, clip);
        }
    return y;
}

inline Image block(const mnv2::BlockSizes& s, const Weights& w, const Image& x) {
    const Image h =
        s.expansion ? pointwise(x, w.expand, w.b_expand, s.hidden_channels, s.clip_expand) : x;
    Image d{s.H_out, s.W_out, s.hidden_channels, Numbers(s.H_out * s.W_out * s.hidden_channels)};
    for (int64_t y = 0; y < s.H_out; y++)
        for (int64_t x_out = 0; x_out < s.W_out; x_out++)
            for (int64_t c = 0; c < s.hidden_channels; c++) {
                double sum = bias_of(w.b_dw, c);
                for (int64_t i = 0; i < s.kernel * s.kernel; i++) {
                    const int64_t row = y * s.stride + i / s.kernel * s.dilation - s.pad_top;
                    const int64_t col = x_out * s.stride + i % s.kernel * s.dilation - s.pad_left;
                    sum += h.get(row, col, c) * w.dw[i * s.hidden_channels + c];
                }
                d.at[(y * s.W_out + x_out) * s.hidden_channels + c] = clipped(sum, s.clip_dw);
            }
    Image y = pointwise(d, w.project, w.b_project, s.out_channels, s.clip_project);
    for (size_t i = 0; s.residual && i < y.at.size(); i++) y.at[i] += x.at[i];
    return y;
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
            y.at[i * s.out_channels + n] = clipped(sum, s.clip);
        }
    return y;
}

inline Image mean(const Image& x) {
    Image y{1, 1, x.channels, Numbers(x.channels)};
    for (int64_t c = 0; c < x.channels; c++) {
        for (int64_t p = 0; p < x.H * x.W; p++) y.at[c] += x.at[p * x.channels + c];
        y.at[c] /= static_cast<double>(x.H * x.W);
    }
    return y;
}

// weight (C_out, C_in).
inline Image linear(const Image& x, const Numbers& weight, const Numbers& bias, int64_t features) {
    Image y{1, 1, features, Numbers(features)};
    for (int64_t n = 0; n < features; n++) {
        y.at[n] = bias_of(bias, n);
        for (int64_t k = 0; k < x.channels; k++) y.at[n] += x.at[k] * weight[n * x.channels + k];
    }
    return y;
}
