// Blocks in training, whose batch norms use the statistics of the batch, against float64.
#pragma once
#include <optional>

#include "backward_checks.h"
#include "training_reference.h"

// Parts of the largest number that rounding may take. A gradient that goes through a norm is what
// is left of larger ones.
constexpr double kForwardTolerance = 5e-6;
constexpr double kGradientTolerance = 2e-5;
// Large: what a channel of few pixels varies by may be little, and rounding errors are divided by
// it. Different: neither norm may take that of the other.
constexpr double kEpsExpand = 0.125, kEpsDw = 0.25;
// Rounding may not decide on which side of a clip's bound a number is, where its gradient jumps.
constexpr double kFromBounds = 1e-4;

inline const float* floats(Memory& memory, const Numbers& numbers) {
    return static_cast<const float*>(memory.constants(numbers, Element::single));
}

inline float* float_place(Memory& memory, int64_t count, bool aligned = false) {
    return static_cast<float*>(memory.allocate(count * 4, aligned));
}

// Aligned: pieces may begin between two doubles otherwise.
inline double* double_place(Memory& memory, int64_t count) {
    return static_cast<double*>(memory.allocate(count * 8, true));
}

inline double* zero_sums(Memory& memory, int64_t count) {
    double* const sums = double_place(memory, count);
    std::fill_n(sums, count, 0.0);
    return sums;
}

inline void compare_doubles(const Numbers& right, const double* given, double tolerance) {
    const std::vector<float> rounded(given, given + right.size());
    compare(right, rounded.data(), Element::single, tolerance);
}

inline const BackwardKernel& training_kernel() { return select_backward_kernel(kernel().name); }

// A norm with the statistics that it finds, as the reference and as the kernels have it.
struct NormInputs {
    double eps;
    Statistics found;
    Scaled scaled;
    const float *gamma, *beta;
};

// What is added to gamma v so that no sum is near a bound of the clip.
inline Numbers shifts_from_bounds(std::mt19937& engine, const Images& v, const Numbers& gamma,
                                  Clip clip) {
    const int64_t channels = v[0].channels;
    Numbers shifts(channels);
    const auto is_near = [&](int64_t c) {
        for (const Image& image : v)
            for (size_t i = c; i < image.at.size(); i += channels)
                for (const double bound : {clip.lower, clip.upper})
                    if (std::fabs(gamma[c] * image.at[i] + shifts[c] - bound) < kFromBounds)
                        return true;
        return false;
    };
    for (int64_t c = 0; c < channels; c++) {
        int tries = 0;
        do {
            if (tries++ == 1000) stop("every shift has a number near a bound");
            shifts[c] = random_numbers(engine, 1, 2)[0];
        } while (is_near(c));
    }
    return shifts;
}

// A norm for what a convolution gives, which becomes normalised.
inline NormInputs norm_inputs(Memory& memory, std::mt19937& engine, Images& rows, Clip clip,
                              double eps) {
    NormInputs norm{};
    norm.eps = eps, norm.found = statistics(rows);
    for (Image& image : rows)
        for (size_t i = 0; i < image.at.size(); i++) {
            const size_t c = i % image.channels;
            image.at[i] = (image.at[i] - norm.found.mean[c]) / std::sqrt(norm.found.var[c] + eps);
        }
    norm.scaled.gamma = random_numbers(engine, rows[0].channels, 2);
    norm.scaled.beta = shifts_from_bounds(engine, rows, norm.scaled.gamma, clip);
    norm.gamma = floats(memory, norm.scaled.gamma);
    norm.beta = floats(memory, norm.scaled.beta);
    return norm;
}

// Weights as they are, the norms that use the statistics of the batch, and the result of the
// projection, without its bias.
struct TrainingInputs {
    BackwardInputs in;
    std::optional<NormInputs> norm_expand, norm_dw;
    Numbers projected;
};

// A convolution before such a norm has no bias. There is at least one.
struct LiveNorms {
    bool expand, dw;
};

inline TrainingInputs training_inputs(Memory& memory, std::mt19937& engine, const BlockSizes& s,
                                      BlockOptions options, LiveNorms live) {
    options.biases[0] = options.biases[0] && !live.expand;
    options.biases[1] = options.biases[1] && !live.dw && !live.expand;
    TrainingInputs t{backward_inputs(memory, engine, s, options), {}, {}, {}};
    BackwardArgs& args = t.in.args;
    Weights& w = t.in.weights;
    const BlockArgs unclipped = without_clips(args);
    Images h, d;
    for (const Image& x : t.in.images) h.push_back(expansion(unclipped, w, x));
    if (live.expand) t.norm_expand = norm_inputs(memory, engine, h, s.clip_expand, kEpsExpand);
    if (s.expansion)
        h = clipped(h, t.norm_expand ? t.norm_expand->scaled : Scaled{}, s.clip_expand);
    for (const Image& of_image : h) d.push_back(depthwise(unclipped, w, of_image));
    Scaled after_dw;
    if (live.dw) {
        t.norm_dw = norm_inputs(memory, engine, d, s.clip_dw, kEpsDw);
        after_dw = t.norm_dw->scaled;
    } else {
        const Numbers ones(s.hidden_channels, 1);
        after_dw = {ones, shifts_from_bounds(engine, d, ones, s.clip_dw)};
        args.b_dw = floats(memory, w.b_dw = after_dw.beta);
    }
    for (const Image& of_image : clipped(d, after_dw, s.clip_dw)) {
        const Image y = pointwise(of_image, w.project, {}, s.out_channels, unclipped.after_dw());
        t.projected.insert(t.projected.end(), y.at.begin(), y.at.end());
    }
    return t;
}

// Of a schedule of the whole batch, each group on its own.
inline void check_training_forward(Memory& memory, const TrainingInputs& t,
                                   const BackwardSchedule& schedule) {
    const BackwardArgs& args = t.in.args;
    double* statistics_of[2][2] = {};
    const auto forward_norm = [&](const std::optional<NormInputs>& norm, double** places) {
        if (!norm) return ForwardNorm{};
        for (int i = 0; i < 2; i++) places[i] = double_place(memory, args.hidden_channels);
        return ForwardNorm{norm->gamma, norm->beta, norm->eps, places[0], places[1]};
    };
    const ForwardNorm norm_expand = forward_norm(t.norm_expand, statistics_of[0]);
    const ForwardNorm norm_dw = forward_norm(t.norm_dw, statistics_of[1]);
    float* const scratch = float_place(memory, backward_scratch(args, schedule, true), true);
    std::vector<float> sum(t.projected.size());
    for (int64_t group = 0; group < schedule.groups; group++) {
        float* const part = float_place(memory, t.projected.size());
        training_kernel().train(args, schedule, t.norm_expand ? &norm_expand : nullptr,
                                t.norm_dw ? &norm_dw : nullptr, group, group + 1, part, scratch);
        counts().calls++;
        for (size_t i = 0; i < sum.size(); i++) sum[i] += part[i];
    }
    compare(t.projected, sum.data(), Element::single, kForwardTolerance);
    const auto compare_statistics = [](const std::optional<NormInputs>& norm,
                                       double* const* places) {
        if (!norm) return;
        compare_doubles(norm->found.mean, places[0], kForwardTolerance);
        compare_doubles(norm->found.var, places[1], kForwardTolerance);
    };
    compare_statistics(t.norm_expand, statistics_of[0]);
    compare_statistics(t.norm_dw, statistics_of[1]);
}

// Of the depthwise result, cut into tasks as callers do; the expansion has no norm of its own.
inline void check_moments(Memory& memory, const TrainingInputs& t) {
    BackwardArgs args = t.in.args;
    args.grad_y = nullptr;
    const BackwardSchedule schedule = choose_backward_schedule(args, kernel().lanes);
    const BackwardSplit split = choose_moments_split(args, schedule);
    const int64_t channels = args.hidden_channels;
    const auto of_image = static_cast<double>(args.H_out * args.W_out);
    float* const scratch = float_place(memory, backward_scratch(args, schedule, true), true);
    const Moments all{double_place(memory, channels), double_place(memory, channels)};
    double before = 0;
    for (int64_t range = 0; range < split.images; range++) {
        const Moments own{double_place(memory, channels), double_place(memory, channels)};
        args.moments = &own;
        const int64_t begin = range * args.N / split.images;
        const int64_t end = (range + 1) * args.N / split.images;
        for (int64_t group = 0; group < schedule.groups; group++)
            training_kernel().run(args, schedule, {}, begin, end, group, group + 1, nullptr,
                                  scratch);
        counts().calls++;
        const double count = static_cast<double>(end - begin) * of_image;
        merge_moments(own, channels, count, before, all);
        before += count;
    }
    Numbers squares = t.norm_dw->found.var;
    for (double& number : squares) number *= before;
    compare_doubles(t.norm_dw->found.mean, all.mean, kForwardTolerance);
    compare_doubles(squares, all.squares, kForwardTolerance);
}

// The weight and the bias of a convolution whose result is normalised already.
inline void fold_norm(const NormInputs& norm, Numbers& weight, Numbers& bias) {
    const size_t channels = norm.found.mean.size();
    const auto inverse = [&](size_t c) { return 1 / std::sqrt(norm.found.var[c] + norm.eps); };
    for (size_t i = 0; i < weight.size(); i++)
        weight[i] = static_cast<float>(weight[i] * inverse(i % channels));
    bias.resize(channels);
    for (size_t c = 0; c < channels; c++)
        bias[c] = static_cast<float>(-norm.found.mean[c] * inverse(c));
}

inline void fold_norms(Memory& memory, TrainingInputs& t) {
    BackwardArgs& args = t.in.args;
    Weights& w = t.in.weights;
    if (t.norm_expand) {
        fold_norm(*t.norm_expand, w.expand, w.b_expand);
        args.w_expand = floats(memory, w.expand), args.b_expand = floats(memory, w.b_expand);
    }
    if (t.norm_dw) {
        fold_norm(*t.norm_dw, w.dw, w.b_dw);
        args.w_dw = floats(memory, w.dw), args.b_dw = floats(memory, w.b_dw);
    }
}

inline LiveNorm live_norm(const std::optional<NormInputs>& norm, int64_t pixels, double* sums) {
    if (!norm) return {};
    return {norm->gamma, norm->beta, sums, static_cast<double>(pixels)};
}

// A norm may leave little more than rounding of what its sums are made of: a bias before it has no
// gradient, nor has the scale of a weight, but for eps.
inline void compare_training(const TrainingGradients& right, const Gradients& out) {
    const Least least{largest_of(right.sums_expand), largest_of(right.sums_dw)};
    compare_gradients(right.of_block, out, kGradientTolerance, least);
}

// A schedule of the whole batch, each group on its own: of x it gives a part of the gradient.
inline void check_together(Memory& memory, const TrainingInputs& t, const TrainingGradients& right,
                           const BackwardSchedule& schedule, int asked) {
    BackwardArgs args = t.in.args;
    const int64_t sums = 2 * args.hidden_channels;
    const LiveNorm norm_expand =
        live_norm(t.norm_expand, args.N * args.H * args.W, zero_sums(memory, sums));
    const LiveNorm norm_dw =
        live_norm(t.norm_dw, args.N * args.H_out * args.W_out, zero_sums(memory, sums));
    args.norm_expand = t.norm_expand ? &norm_expand : nullptr;
    args.norm_dw = t.norm_dw ? &norm_dw : nullptr;
    args.pass = Pass::together;
    const Gradients out = place_gradients(memory, right.of_block, asked);
    float* const scratch = float_place(memory, backward_scratch(args, schedule, true), true);
    const size_t x_size = right.of_block.x.size();
    for (int64_t group = 0; group < schedule.groups; group++) {
        Gradients own = out;
        const bool has_own_x = out.x != nullptr && args.expansion && group > 0;
        if (has_own_x) own.x = float_place(memory, x_size);
        training_kernel().run(args, schedule, own, 0, args.N, group, group + 1, nullptr, scratch);
        counts().calls++;
        for (size_t i = 0; has_own_x && i < x_size; i++) out.x[i] += own.x[i];
    }
    compare_training(right, out);
    if (t.norm_expand) compare_doubles(right.sums_expand, norm_expand.sums, kGradientTolerance);
    if (t.norm_dw) compare_doubles(right.sums_dw, norm_dw.sums, kGradientTolerance);
}

// Bands, or some images together, in two calls for each of `ranges` ranges of images: the first
// ones sum over their images, the others need the sums of all.
inline void check_two_passes(Memory& memory, const TrainingInputs& t,
                             const TrainingGradients& right, int64_t ranges, int asked) {
    BackwardArgs args = t.in.args;
    const BackwardSchedule schedule = choose_backward_schedule(args, kernel().lanes);
    const int64_t sums = 2 * args.hidden_channels, pixels = args.N * args.H_out * args.W_out;
    const Gradients out = place_gradients(memory, right.of_block, asked);
    float* const scratch = float_place(memory, backward_scratch(args, schedule, true), true);
    float* const sum_of_x = float_place(memory, right.of_block.x.size(), true);
    double* const all = zero_sums(memory, sums);
    for (const Pass pass : {Pass::sums, Pass::gradients})
        for (int64_t range = 0; range < ranges; range++) {
            double* const own = pass == Pass::sums ? zero_sums(memory, sums) : all;
            const LiveNorm norm = live_norm(t.norm_dw, pixels, own);
            args.norm_dw = &norm, args.pass = pass;
            Gradients of_pass{};
            if (pass == Pass::sums)
                of_pass.w_project = out.w_project;
            else
                of_pass = out, of_pass.w_project = nullptr;
            training_kernel().run(args, schedule, of_pass, range * args.N / ranges,
                                  (range + 1) * args.N / ranges, 0, schedule.groups, sum_of_x,
                                  scratch);
            counts().calls++;
            for (int64_t i = 0; pass == Pass::sums && i < sums; i++) all[i] += own[i];
        }
    counts().strips += schedule.rows < args.H_out;
    compare_training(right, out);
    compare_doubles(right.sums_dw, all, kGradientTolerance);
}

inline Numbers transposed(const Numbers& rows, int64_t columns) {
    Numbers found(rows.size());
    const auto count = static_cast<int64_t>(rows.size()) / columns;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < columns; j++) found[j * count + i] = rows[i * columns + j];
    return found;
}

// The weights of the convolutions in the place of the folded ones, as training has them. Half of
// each with a scale of two: the same numbers.
inline void set_convolutions(Memory& memory, TrainingInputs& t) {
    BackwardArgs& args = t.in.args;
    const auto halves = [&](const Numbers& weight, int64_t columns) {
        Numbers rows = transposed(weight, columns);
        for (double& number : rows) number /= 2;
        return floats(memory, rows);
    };
    const auto twos = [&](int64_t rows) { return floats(memory, Numbers(rows, 2)); };
    if (args.expansion) {
        args.conv_expand = halves(t.in.weights.expand, args.hidden_channels);
        args.scale_expand = twos(args.hidden_channels), args.w_expand = nullptr;
    }
    args.conv_project = halves(t.in.weights.project, args.out_channels);
    args.scale_project = twos(args.out_channels), args.w_project = nullptr;
}

inline void check_live(std::mt19937& engine, const BlockSizes& s, const BlockOptions& options,
                       bool at_end, int asked, LiveNorms live) {
    Memory memory(at_end);
    TrainingInputs t = training_inputs(memory, engine, s, options, live);
    set_convolutions(memory, t);
    const BackwardSchedule schedule = choose_training_schedule(s, kernel().lanes);
    if (schedule.whole_batch) check_training_forward(memory, t, schedule);
    if (!live.expand) check_moments(memory, t);
    fold_norms(memory, t);
    set_convolutions(memory, t);
    TrainingGradients right{no_gradients(s), {}, {}};
    const auto scaled = [](const std::optional<NormInputs>& norm) {
        return norm ? norm->scaled : Scaled{};
    };
    training_gradients(t.in.args, t.in.weights, scaled(t.norm_expand), scaled(t.norm_dw),
                       t.in.images, t.in.grads_y, right);
    right.of_block.project = transposed(right.of_block.project, s.out_channels);
    if (s.expansion) right.of_block.expand = transposed(right.of_block.expand, s.hidden_channels);
    if (schedule.whole_batch) check_together(memory, t, right, schedule, asked);
    for (int64_t ranges = 1; !live.expand && ranges <= std::min<int64_t>(s.N, 2); ranges++)
        check_two_passes(memory, t, right, ranges, asked);
    memory.check_margins();
}

// Where a channel has one value its deviation is nothing: blocks of these are left out.
inline void check_training(std::mt19937& engine, const BlockSizes& s, const BlockOptions& options,
                           bool at_end, int asked) {
    if (s.N * s.H * s.W == 1 || s.N * s.H_out * s.W_out == 1) return;
    check_live(engine, s, options, at_end, asked, {false, true});
    if (s.expansion) check_live(engine, s, options, at_end, asked, {true, engine() % 3 != 0});
}
