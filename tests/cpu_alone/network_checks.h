// Networks of the CPU kernels with their weights, and what is checked of every call.
#pragma once
#include <thread>

#include "reference.h"

using namespace mnv2::cpu;
using mnv2::Activation;
using mnv2::BlockArgs;
using mnv2::BlockSizes;
using mnv2::Clip;
using mnv2::Curve;

constexpr float kUpper = 3;
constexpr Clip kClips[] = {{0, kUpper}, {0, INFINITY}, {-INFINITY, INFINITY}};

// A clip, or one of the curves by its number from 1 on.
inline Activation activation_of(int64_t curve, const Clip& clip) {
    return {static_cast<Curve>(curve), curve == 0 ? clip : kClips[2]};
}

struct Counts {
    int64_t calls, low, high, streams, in_place, groups, chunks, strips, gates, curves, dense;
};

// What the whole process uses.
struct Setting {
    const Kernel* kernel = kKernels[0];
    bool threads_at_once = false;  // tasks are run by threads, otherwise one after the other
    Counts counts{};
};
inline Setting& setting() {
    static Setting s;
    return s;
}
inline const Kernel& kernel() { return *setting().kernel; }
inline Counts& counts() { return setting().counts; }

inline Threads threads_of(int64_t count) {
    if (setting().threads_at_once)
        return {count, [](int64_t tasks, const auto& task) {
                    std::vector<std::thread> threads;
                    for (int64_t i = 0; i < tasks; i++) threads.emplace_back(task, i, i);
                    for (std::thread& thread : threads) thread.join();
                }};
    return {count, [count](int64_t tasks, const auto& task) {
                for (int64_t i = tasks - 1; i >= 0; i--) task(i, i % count);
            }};
}

// Weights of a block as a kernel reads them.
struct BlockOptions {
    Element element;
    bool biases[3];
    bool for_network;
    int nan_in;  // 0: in no bias; 1, 2, 3: in that of the expansion, depthwise, projection
    // After expansion, depthwise, projection and squeeze, where they are not 0 in place of a clip.
    int64_t curves[4];
    int64_t gate_width;
    bool hard;
};

// A network, its weights, and what it must give.
struct Network {
    Memory& memory;
    std::mt19937& engine;
    Element element;
    std::vector<Step> steps;
    Image result;

    // Weights whose sums over `terms` products are a few units.
    const void* weight(int64_t count, int64_t terms, Numbers& numbers) {
        numbers = random_numbers(engine, count, std::max(0.07, 3 / std::sqrt(double(terms))));
        return memory.constants(numbers, element);
    }
    const float* bias(int64_t count, Numbers& numbers, bool there, bool with_nan = false) {
        if (!there) return nullptr;
        numbers = random_numbers(engine, count, 2);
        if (with_nan) numbers[engine() % count] = NAN;
        return static_cast<const float*>(memory.constants(numbers, Element::single));
    }

    void add(const auto& layer) { steps.push_back({layer, 0, false}); }

    void add_block(const BlockSizes& sizes, const BlockOptions& options) {
        BlockArgs args{};
        static_cast<BlockSizes&>(args) = sizes;
        args.N = 1;  // a network is run image by image
        args.element = element;
        Weights w;
        const int64_t hidden = args.hidden_channels, window = args.kernel_size * args.kernel_size;
        const int64_t taps = window * (args.dense ? args.in_channels : 1);
        counts().dense += args.dense;
        const auto& [e, biases, for_network, nan_in, curves, gate_width, hard] = options;
        const auto set = [](Curve& curve, Clip& clip, int64_t number) {
            const Activation made = activation_of(number, clip);
            curve = made.curve, clip = made.clip;
        };
        set(args.curve_expand, args.clip_expand, curves[0]);
        set(args.curve_dw, args.clip_dw, curves[1]);
        set(args.curve_project, args.clip_project, curves[2]);
        counts().curves += curves[0] > 0 || curves[1] > 0 || curves[2] > 0;
        if (args.expansion) {
            args.w_expand = weight(args.in_channels * hidden, args.in_channels, w.expand);
            args.b_expand = bias(hidden, w.b_expand, biases[0], nan_in == 1);
        }
        args.w_dw = weight(taps * hidden, taps, w.dw);
        args.b_dw = bias(hidden, w.b_dw, biases[1], nan_in == 2);
        args.w_project = weight(hidden * args.out_channels, 4 * hidden, w.project);
        args.b_project = bias(args.out_channels, w.b_project, biases[2], nan_in == 3);
        if (gate_width > 0) {
            auto& g = args.gate;
            g.width = gate_width, g.hard = hard, g.squeeze = activation_of(curves[3], kClips[1]);
            g.w_squeeze = weight(hidden * gate_width, hidden, w.squeeze);
            g.b_squeeze = bias(gate_width, w.b_squeeze, biases[0]);
            g.w_excite = weight(gate_width * hidden, gate_width, w.excite);
            g.b_excite = bias(hidden, w.b_excite, biases[1]);
            counts().gates++;
        }
        args.pairs = kernel().multiplies_pairs(args);
        const auto choose = for_network ? choose_network_schedule : choose_schedule;
        const Schedule schedule = choose(args, kernel().lanes);
        counts().groups += schedule.hidden_groups > 1;
        counts().chunks += !schedule.rows_outside;
        counts().strips += schedule.strip_cols < args.W_out;
        result = block(args, w, result);
        add(BlockStep{args, schedule});
    }

    void add_stem(int64_t channels, int64_t pad, int64_t curve) {
        StemArgs args{};
        args.H = result.H, args.W = result.W, args.in_channels = result.channels;
        args.H_out = (args.H + 2 * pad - 3) / 2 + 1, args.W_out = (args.W + 2 * pad - 3) / 2 + 1;
        args.out_channels = channels, args.pad_top = pad, args.pad_left = pad;
        args.row_stride = args.W * args.in_channels, args.col_stride = args.in_channels;
        args.channel_stride = 1;
        args.element = element, args.activation = activation_of(curve, kClips[0]);
        Numbers w, b;
        args.weight = weight(9 * args.in_channels * channels, 9 * args.in_channels, w);
        args.bias = bias(channels, b, true);
        result = stem(args, w, b, result);
        add(args);
    }

    void add_pointwise(int64_t channels, bool averages, int64_t curve) {
        PointwiseArgs args{};
        args.H = result.H, args.W = result.W, args.in_channels = result.channels;
        args.averages = averages;
        args.out_channels = channels;
        args.element = element, args.activation = activation_of(curve, kClips[0]);
        Numbers w, b;
        args.weight = weight(args.in_channels * channels, args.in_channels, w);
        args.bias = bias(channels, b, true);
        args.pairs = kernel().multiplies_pairs(args);
        result = pointwise(result, w, b, channels, args.activation);
        if (averages) result = mean(result);
        add(args);
    }

    void add_average() {
        add(AverageArgs{result.H, result.W, result.channels, element});
        result = mean(result);
    }

    void add_linear(int64_t features, int64_t curve) {
        LinearArgs args{result.channels, features, element, nullptr, nullptr, {}};
        args.activation = activation_of(curve, kClips[2]);
        Numbers w, b;
        args.weight = weight(result.channels * features, result.channels, w);
        args.bias = bias(features, b, true);
        result = linear(result, w, b, features, args.activation);
        add(args);
    }
};

// The numbers of a step's result.
inline int64_t result_size(const Step& step) {
    if (const auto* b = std::get_if<BlockStep>(&step.layer))
        return b->args.H_out * b->args.W_out * b->args.out_channels;
    if (const auto* s = std::get_if<StemArgs>(&step.layer))
        return s->H_out * s->W_out * s->out_channels;
    if (const auto* p = std::get_if<PointwiseArgs>(&step.layer))
        return p->out_channels * (p->averages ? 1 : p->H * p->W);
    if (const auto* a = std::get_if<AverageArgs>(&step.layer)) return a->channels;
    return std::get<LinearArgs>(step.layer).out_features;
}

// Every result in a place of its own, but what streams or overwrites its input. Returns the size.
inline int64_t arrange(std::vector<Step>& steps, bool stream) {
    int64_t end = 0, input = -1;
    for (size_t i = 0; i + 1 < steps.size(); i++) {
        Step& step = steps[i];
        step.streams = stream && is_row_by_row(step) && takes_rows(steps[i + 1]);
        counts().streams += step.streams;
        if (step.streams) continue;
        const auto* block = std::get_if<BlockStep>(&step.layer);
        const bool may =
            block && (block->args.gate.width > 0
                          ? result_size(step) <= result_size(steps[i - 1])
                          : is_row_by_row(step) && block->args.residual && block->args.expansion);
        const bool in_place = input >= 0 && !(i > 0 && steps[i - 1].streams) && may;
        counts().in_place += in_place;
        step.output = in_place ? input : end;
        if (!in_place) end += (result_size(step) + 15) / 16 * 16;
        input = step.output;
    }
    for (Step& step : steps) {
        step.kept = end;
        end += (kept_elements(step, kernel().lanes) + 15) / 16 * 16;
    }
    return end;
}

inline double tolerance_of(Element element) {
    return element == Element::single ? 2e-6 : element == Element::half ? 5e-4 : 4e-3;
}

inline double largest_of(const Numbers& numbers) {
    double largest = 0;
    for (const double value : numbers)
        if (!std::isnan(value)) largest = std::max(largest, std::fabs(value));
    return largest;
}

// Whether numbers are those of `right`, to a part of the largest of them or of `least`, and NaN
// where it is.
inline void compare(const Numbers& right, const void* given, Element element, double tolerance,
                    double least = 0) {
    const double largest = std::max(largest_of(right), least);
    for (size_t i = 0; i < right.size(); i++) {
        const double y = read(given, static_cast<int64_t>(i), element);
        counts().low += y == 0, counts().high += y == kUpper;
        if (std::isnan(y) != std::isnan(right[i])) {
            fault("NaN");
        } else if (std::fabs(y - right[i]) > tolerance * largest) {
            if (faults().count("numbers") == 0)
                std::printf("number %ld is %.9g and should be %.9g\n", long(i), y, right[i]);
            fault("numbers");
        }
    }
}

inline void* run_once(Network& network, const void* x, int64_t arena_size, int64_t threads) {
    Memory& memory = network.memory;
    const int64_t size = size_of(network.element);
    void* const arena = memory.allocate(arena_size * size, true);
    const int64_t floats = line_floats(network.steps, kernel().lanes, threads);
    auto* const lines = static_cast<float*>(memory.allocate(floats * 4, true));
    void* const y =
        memory.allocate(result_size(network.steps.back()) * size, false, network.element);
    run_network(kernel(), network.steps, x, y, arena, lines, threads_of(threads));
    return y;
}

// Runs it with and without streams, each on one thread and on three: all give the same bits.
inline void check(Network& network, const void* x, double tolerance) {
    const int64_t bytes = result_size(network.steps.back()) * size_of(network.element);
    const void* first = nullptr;
    for (const bool stream : {false, true}) {
        const int64_t arena_size = arrange(network.steps, stream);
        for (const int64_t threads : {1, 3}) {
            const void* const y = run_once(network, x, arena_size, threads);
            counts().calls++;
            if (first == nullptr) first = y;
            if (std::memcmp(first, y, bytes) != 0) fault("bits");
            compare(network.result.at, y, network.element, tolerance);
        }
        if (network.steps.size() == 1) break;
    }
    network.memory.check_margins();
}
