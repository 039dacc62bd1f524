// The functions on rows of channels that batch norms over whole batches need, against float64.
#pragma once
#include "training_checks.h"

// Rows whose channels are far from zero, and numbers near their means.
struct RowInputs {
    int64_t pixels, channels;
    Numbers rows, mean;
};

inline RowInputs row_inputs(std::mt19937& engine, int64_t pixels, int64_t channels) {
    RowInputs in{pixels, channels, random_numbers(engine, pixels * channels, 2),
                 random_numbers(engine, channels, 30)};
    for (size_t i = 0; i < in.rows.size(); i++) in.rows[i] += in.mean[i % channels];
    for (double& number : in.mean) number += random_numbers(engine, 1, 1)[0];
    return in;
}

// visit(pixel, channel, their place in the rows)
inline void each_number(const RowInputs& in, const auto& visit) {
    for (int64_t p = 0; p < in.pixels; p++)
        for (int64_t c = 0; c < in.channels; c++) visit(p, c, p * in.channels + c);
}

// Sums over pixels, in two calls, of which the first may have no pixel.
inline void check_sums_of_rows(Memory& memory, std::mt19937& engine, const RowInputs& in) {
    const auto& [pixels, channels, rows, mean] = in;
    const BackwardKernel& kernel = training_kernel();
    const float *const x = floats(memory, rows), *const means = floats(memory, mean);
    const int64_t first = pixels / 3, rest = pixels - first;
    const float* const x_rest = x + first * channels;

    const Statistics right = statistics({Image{pixels, 1, channels, rows}});
    const Moments moments{double_place(memory, channels), double_place(memory, channels)};
    kernel.add_moments(x, first, channels, 0, moments);
    kernel.add_moments(x_rest, rest, channels, first, moments);
    Numbers squares = right.var;
    for (double& number : squares) number *= static_cast<double>(pixels);
    compare_doubles(right.mean, moments.mean, kForwardTolerance);
    compare_doubles(squares, moments.squares, kForwardTolerance);

    Numbers covariance(channels * channels);
    each_number(in, [&](int64_t p, int64_t c, int64_t at) {
        for (int64_t n = 0; n < channels; n++)
            covariance[c * channels + n] +=
                (rows[at] - mean[c]) * (rows[p * channels + n] - mean[n]);
    });
    double* const products = zero_sums(memory, channels * channels);
    float* const scratch = float_place(memory, covariance_scratch(channels));
    kernel.add_covariance(x, first, channels, means, products, scratch);
    kernel.add_covariance(x_rest, rest, channels, means, products, scratch);
    compare_doubles(covariance, products, kForwardTolerance);

    const Numbers gradient = random_numbers(engine, pixels * channels, 1);
    const float* const g = floats(memory, gradient);
    Numbers sums(2 * channels);
    each_number(in, [&](int64_t, int64_t c, int64_t at) {
        sums[c] += gradient[at];
        sums[channels + c] += gradient[at] * (rows[at] - mean[c]);
    });
    double* const norm_sums = zero_sums(memory, 2 * channels);
    kernel.add_norm_sums(g, x, first, channels, means, norm_sums);
    kernel.add_norm_sums(g + first * channels, x_rest, rest, channels, means, norm_sums);
    compare_doubles(sums, norm_sums, kForwardTolerance);
    counts().calls += 6;
}

// What is written for every pixel; the residual is there in every second call.
inline void check_normalized_rows(Memory& memory, std::mt19937& engine, const RowInputs& in) {
    const auto& [pixels, channels, rows, mean] = in;
    const int64_t size = pixels * channels;
    const float *const x = floats(memory, rows), *const means = floats(memory, mean);
    const auto draw = [&](int64_t count, Numbers& numbers) {
        return floats(memory, numbers = random_numbers(engine, count, 2));
    };
    Numbers scale, shift, added, gradient, factor;
    const float *const scales = draw(channels, scale), *const shifts = draw(channels, shift);
    const float *const residual = draw(size, added), *const g = draw(size, gradient);
    const float* const factors = draw(channels, factor);
    const mnv2::cpu::Affine affine{means, scales, shifts};
    for (const bool has_residual : {false, true}) {
        Numbers right(size);
        each_number(in, [&](int64_t, int64_t c, int64_t at) {
            right[at] = (rows[at] - mean[c]) * scale[c] + shift[c];
            if (has_residual) right[at] += added[at];
        });
        float* const out = float_place(memory, size);
        training_kernel().normalize(x, pixels, channels, affine, has_residual ? residual : nullptr,
                                    out);
        compare(right, out, Element::single, kForwardTolerance);
    }
    Numbers right(size);
    each_number(in, [&](int64_t, int64_t c, int64_t at) {
        right[at] = gradient[at] * factor[c] - ((rows[at] - mean[c]) * scale[c] + shift[c]);
    });
    float* const out = float_place(memory, size);
    training_kernel().norm_gradient(g, x, pixels, channels, factors, affine, out);
    compare(right, out, Element::single, kForwardTolerance);
    counts().calls += 3;
}

inline void check_products_of_rows(Memory& memory, std::mt19937& engine, const RowInputs& in) {
    const auto& [pixels, channels, rows, mean] = in;
    const int64_t columns = 2 * channels - 1;
    const BackwardKernel& kernel = training_kernel();
    const float *const x = floats(memory, rows), *const means = floats(memory, mean);
    const Numbers weight = random_numbers(engine, channels * columns, 1);
    const Numbers bias = random_numbers(engine, columns, 2);
    const Numbers begin = random_numbers(engine, pixels * columns, 2);
    const Numbers added = random_numbers(engine, pixels * columns, 2);
    const float* const w = floats(memory, weight);
    for (const bool has_residual : {false, true}) {
        Numbers right = begin;
        for (size_t i = 0; i < right.size(); i++)
            right[i] += bias[i % columns] + (has_residual ? added[i] : 0);
        each_number(in, [&](int64_t p, int64_t c, int64_t at) {
            for (int64_t n = 0; n < columns; n++)
                right[p * columns + n] += (rows[at] - mean[c]) * weight[c * columns + n];
        });
        float* const out = float_place(memory, pixels * columns);
        std::copy(begin.begin(), begin.end(), out);
        kernel.add_centred_product(
            {x, means, w, floats(memory, bias), has_residual ? floats(memory, added) : nullptr,
             pixels, channels, columns, out, float_place(memory, covariance_scratch(channels))});
        compare(right, out, Element::single, kForwardTolerance);
    }

    // `place` says which row of the result a number of x adds to, and which row of `other` it
    // multiplies.
    const auto check_product = [&](MultiplyFn multiply, const Numbers& other, int64_t size,
                                   int64_t depth, const auto& place) {
        Numbers product(size * columns);
        each_number(in, [&](int64_t p, int64_t c, int64_t at) {
            const auto [to, from] = place(p, c);
            for (int64_t n = 0; n < columns; n++)
                product[to * columns + n] += rows[at] * other[from * columns + n];
        });
        float* const out = float_place(memory, size * columns);
        multiply(x, floats(memory, other), size, depth, columns, out);
        compare(product, out, Element::single, kForwardTolerance);
    };
    using Places = std::pair<int64_t, int64_t>;
    check_product(kernel.multiply, weight, pixels, channels,
                  [](int64_t p, int64_t c) { return Places{p, c}; });
    check_product(kernel.multiply_transposed, added, channels, pixels,
                  [](int64_t p, int64_t c) { return Places{c, p}; });
    counts().calls += 4;
}

inline void check_rows(std::mt19937& engine, int64_t pixels, int64_t channels, bool at_end) {
    Memory memory(at_end);
    const RowInputs in = row_inputs(engine, pixels, channels);
    check_sums_of_rows(memory, engine, in);
    check_normalized_rows(memory, engine, in);
    check_products_of_rows(memory, engine, in);
    memory.check_margins();
}
