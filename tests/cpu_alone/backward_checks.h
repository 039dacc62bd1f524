// Gradients of the block against those of float64.
#pragma once
#include "../../csrc/cpu/backward.h"
#include "network_checks.h"

// Weights for the backward kernel and for the reference.
struct BackwardInputs {
    BackwardArgs args;
    Weights weights;
    std::vector<Image> images;
    std::vector<Numbers> grads_y;
};

inline BackwardInputs backward_inputs(Memory& memory, std::mt19937& engine, const BlockSizes& s,
                                      const BlockOptions& options) {
    BackwardInputs in{};
    static_cast<BlockSizes&>(in.args) = s;
    in.args.element = Element::single;
    const int64_t hidden = s.hidden_channels, taps = s.kernel_size * s.kernel_size;
    const auto floats = [&](const Numbers& numbers) {
        return static_cast<const float*>(memory.constants(numbers, Element::single));
    };
    const auto weight = [&](Numbers& numbers, int64_t count, int64_t terms) {
        numbers = random_numbers(engine, count, std::max(0.07, 3 / std::sqrt(double(terms))));
        return floats(numbers);
    };
    Weights& w = in.weights;
    if (s.expansion) in.args.w_expand = weight(w.expand, s.in_channels * hidden, s.in_channels);
    if (s.expansion && options.biases[0])
        in.args.b_expand = floats(w.b_expand = random_numbers(engine, hidden, 2));
    in.args.w_dw = weight(w.dw, taps * hidden, taps);
    if (options.biases[1]) in.args.b_dw = floats(w.b_dw = random_numbers(engine, hidden, 2));
    in.args.w_project = weight(w.project, hidden * s.out_channels, 4 * hidden);

    const int64_t x_size = s.H * s.W * s.in_channels, y_size = s.H_out * s.W_out * s.out_channels;
    Numbers x, grad_y;
    for (int64_t i = 0; i < s.N; i++) {
        in.images.push_back({s.H, s.W, s.in_channels, random_numbers(engine, x_size, 2)});
        in.grads_y.push_back(random_numbers(engine, y_size, 1));
        x.insert(x.end(), in.images[i].at.begin(), in.images[i].at.end());
        grad_y.insert(grad_y.end(), in.grads_y[i].begin(), in.grads_y[i].end());
    }
    in.args.x = floats(x), in.args.grad_y = floats(grad_y);
    return in;
}

// Zeros for the gradients of a block's weights, of all images.
inline BlockGradients no_gradients(const BlockSizes& s) {
    const int64_t hidden = s.hidden_channels, taps = s.kernel_size * s.kernel_size;
    return {{},
            Numbers(s.expansion ? s.in_channels * hidden : 0),
            Numbers(s.expansion ? hidden : 0),
            Numbers(taps * hidden),
            Numbers(hidden),
            Numbers(hidden * s.out_channels)};
}

// Places for all gradients that there are, or for that of x alone (asked 1), or for those of
// weights alone (asked 2).
inline Gradients place_gradients(Memory& memory, const BlockGradients& right, int asked) {
    const auto place = [&](const Numbers& numbers, bool wanted) -> float* {
        if (!wanted || numbers.empty()) return nullptr;
        auto* const to = static_cast<float*>(memory.allocate(numbers.size() * sizeof(float)));
        std::fill_n(to, numbers.size(), 0.f);
        return to;
    };
    const bool of_x = asked != 2, of_weights = asked != 1;
    const Gradients out{place(right.x, of_x),
                        place(right.expand, of_weights),
                        place(right.b_expand, of_weights),
                        place(right.dw, of_weights),
                        place(right.b_dw, of_weights),
                        place(right.project, of_weights)};
    if (out.x != nullptr) fill_with_nan(out.x, right.x.size() * sizeof(float));
    return out;
}

// Those of the expansion and of the depthwise to a part of the largest of them, or of these.
struct Least {
    double expand, dw;
};

inline void compare_gradients(const BlockGradients& right, const Gradients& out, double tolerance,
                              Least least) {
    const auto compare_to = [&](const Numbers& numbers, const float* given, double of_numbers) {
        if (given != nullptr) compare(numbers, given, Element::single, tolerance, of_numbers);
    };
    compare_to(right.x, out.x, 0), compare_to(right.expand, out.w_expand, least.expand);
    compare_to(right.b_expand, out.b_expand, least.expand);
    compare_to(right.dw, out.w_dw, least.dw), compare_to(right.b_dw, out.b_dw, least.dw);
    compare_to(right.project, out.w_project, 0);
}

inline void check_backward(std::mt19937& engine, const BlockSizes& s, const BlockOptions& options,
                           bool at_end, int asked) {
    Memory memory(at_end);
    const BackwardInputs in = backward_inputs(memory, engine, s, options);
    BlockGradients right = no_gradients(s);
    Numbers right_x;
    for (int64_t i = 0; i < s.N; i++) {
        add_gradients(in.args, in.weights, in.images[i], in.grads_y[i], right);
        right_x.insert(right_x.end(), right.x.begin(), right.x.end());
    }
    right.x = right_x;
    const Gradients out = place_gradients(memory, right, asked);
    const BackwardSchedule schedule = choose_backward_schedule(s, kernel().lanes);
    const int64_t floats = backward_scratch(s, schedule);
    auto* const scratch = static_cast<float*>(memory.allocate(floats * 4, true));
    auto* const sum_of_x = static_cast<float*>(memory.allocate(right.x.size() * 4, true));
    select_backward_kernel(kernel().name)
        .run(in.args, schedule, out, 0, s.N, 0, schedule.groups, sum_of_x, scratch);
    counts().calls++, counts().chunks += schedule.chunks > 1;
    counts().strips += schedule.rows < s.H_out;
    compare_gradients(right, out, 1e-5, {});
    memory.check_margins();
}
