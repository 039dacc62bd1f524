// The CPU kernels without torch against float64: blocks, and networks of all layers; in memory that
// ends at, or begins behind, pages that cannot be touched. test_neon.py compiles it for aarch64.
//
//   driver blocks | networks | overrun       exits 0 where all is right
#include <algorithm>
#include <string>

#include "reference.h"

using namespace mnv2::cpu;
using mnv2::BlockArgs;
using mnv2::BlockSizes;
using mnv2::Clip;

namespace {

const Kernel& kernel() { return *kKernels[0]; }

constexpr Clip kClips[] = {{0, 6}, {0, INFINITY}, {-INFINITY, INFINITY}};

Threads threads_of(int64_t count) {
    return {count, [count](int64_t tasks, const auto& task) {
                for (int64_t i = tasks - 1; i >= 0; i--) task(i, i % count);
            }};
}

struct Counts {
    int64_t calls, low, high, streams, in_place, groups, chunks, strips;
};
Counts counts{};

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

    void add_block(BlockSizes sizes, bool biases, bool for_network, bool with_nan = false) {
        BlockArgs args{};
        static_cast<BlockSizes&>(args) = sizes;
        args.element = element;
        Weights w;
        const int64_t hidden = args.hidden_channels, taps = args.kernel * args.kernel;
        if (args.expansion) {
            args.w_expand = weight(args.in_channels * hidden, args.in_channels, w.expand);
            args.b_expand = bias(hidden, w.b_expand, biases);
        }
        args.w_dw = weight(taps * hidden, taps, w.dw);
        args.b_dw = bias(hidden, w.b_dw, biases);
        args.w_project = weight(hidden * args.out_channels, 4 * hidden, w.project);
        args.b_project = bias(args.out_channels, w.b_project, biases, with_nan);
        args.pairs = kernel().multiplies_pairs(args);
        const auto choose = for_network ? choose_network_schedule : choose_schedule;
        const Schedule schedule = choose(args, kernel().lanes);
        counts.groups += schedule.hidden_groups > 1;
        counts.chunks += !schedule.rows_outside;
        counts.strips += schedule.strip_cols < args.W_out;
        result = block(sizes, w, result);
        add(BlockStep{args, schedule});
    }

    void add_stem(int64_t channels, int64_t pad) {
        StemArgs args{};
        args.H = result.H, args.W = result.W, args.in_channels = result.channels;
        args.H_out = (args.H + 2 * pad - 3) / 2 + 1, args.W_out = (args.W + 2 * pad - 3) / 2 + 1;
        args.out_channels = channels, args.pad_top = pad, args.pad_left = pad;
        args.row_stride = args.W * args.in_channels, args.col_stride = args.in_channels;
        args.channel_stride = 1;
        args.element = element, args.clip = kClips[0];
        Numbers w, b;
        args.weight = weight(9 * args.in_channels * channels, 9 * args.in_channels, w);
        args.bias = bias(channels, b, true);
        result = stem(args, w, b, result);
        add(args);
    }

    // channels 0: the mean alone.
    void add_pool(int64_t channels, bool averages = true) {
        PoolArgs args{};
        args.H = result.H, args.W = result.W, args.in_channels = result.channels;
        args.averages = averages;
        args.out_channels = channels > 0 ? channels : result.channels;
        args.element = element, args.clip = channels > 0 ? kClips[0] : kClips[2];
        if (channels > 0) {
            Numbers w, b;
            args.weight = weight(args.in_channels * channels, args.in_channels, w);
            args.bias = bias(channels, b, true);
            args.pairs = kernel().multiplies_pairs(args);
            result = pointwise(result, w, b, channels, args.clip);
        }
        if (averages) result = mean(result);
        add(args);
    }

    void add_linear(int64_t features) {
        LinearArgs args{result.channels, features, element, nullptr, nullptr};
        Numbers w, b;
        args.weight = weight(result.channels * features, result.channels, w);
        args.bias = bias(features, b, true);
        result = linear(result, w, b, features);
        add(args);
    }
};

// A step, and the numbers of its result.
int64_t result_size(const Step& step) {
    if (const auto* b = std::get_if<BlockStep>(&step.layer))
        return b->args.H_out * b->args.W_out * b->args.out_channels;
    if (const auto* s = std::get_if<StemArgs>(&step.layer))
        return s->H_out * s->W_out * s->out_channels;
    if (const auto* p = std::get_if<PoolArgs>(&step.layer))
        return p->out_channels * (p->averages ? 1 : p->H * p->W);
    return std::get<LinearArgs>(step.layer).out_features;
}

// Every result in a place of its own, but what streams or overwrites its input. Returns the size.
int64_t arrange(std::vector<Step>& steps, bool stream) {
    int64_t end = 0, input = -1;
    for (size_t i = 0; i + 1 < steps.size(); i++) {
        Step& step = steps[i];
        step.streams = stream && is_row_by_row(step) && is_row_by_row(steps[i + 1]);
        counts.streams += step.streams;
        if (step.streams) continue;
        const auto* block = std::get_if<BlockStep>(&step.layer);
        const bool in_place = input >= 0 && !(i > 0 && steps[i - 1].streams) && block &&
                              is_row_by_row(step) && block->args.residual && block->args.expansion;
        counts.in_place += in_place;
        step.output = in_place ? input : end;
        if (!in_place) end += (result_size(step) + 15) / 16 * 16;
        input = step.output;
    }
    return end;
}

// Runs it on one thread and on three, which must give the same bits.
void check(Network& network, const void* x, double tolerance) {
    Memory& memory = network.memory;
    const int64_t count = result_size(network.steps.back()), size = size_of(network.element);
    void* results[2];
    for (const bool stream : {false, true}) {
        const int64_t arena_size = arrange(network.steps, stream);
        for (const int64_t threads : {1, 3}) {
            void* const arena = memory.allocate(arena_size * size, true);
            const int64_t floats = line_floats(network.steps, kernel().lanes, threads);
            auto* const lines = static_cast<float*>(memory.allocate(floats * 4, true));
            void*& y = results[threads > 1];
            y = memory.allocate(count * size);
            run_network(kernel(), network.steps, x, y, arena, lines, threads_of(threads));
            counts.calls++;
        }
        if (std::memcmp(results[0], results[1], count * size) != 0) fail("threads change bits");
        double largest = 0;
        for (const double value : network.result.at)
            if (!std::isnan(value)) largest = std::max(largest, std::fabs(value));
        for (int64_t i = 0; i < count; i++) {
            const double y = read(results[0], i, network.element), right = network.result.at[i];
            counts.low += y == 0, counts.high += y == 6;
            if (std::isnan(y) != std::isnan(right)) fail("NaN is not where it should be");
            if (std::fabs(y - right) > tolerance * largest) {
                std::printf("number %ld is %.9g and should be %.9g\n", long(i), y, right);
                fail("a number");
            }
        }
        if (network.steps.size() == 1) break;
    }
    memory.check_margins();
}

double tolerance_of(Element element) {
    return element == Element::single ? 2e-6 : element == Element::half ? 5e-4 : 4e-3;
}

struct Channels {
    int64_t in, hidden, out;
};

void check_block(std::mt19937& engine, int number, const Channels& c, int64_t H, int64_t W,
                 int64_t k, int64_t stride, int64_t dilation, Element element) {
    const int64_t extent = dilation * (k - 1);
    const int64_t top = number % 3 == 2 ? number % (extent + 1) : extent / 2;
    const int64_t left = number % 3 == 2 ? extent - top : extent / 2;
    BlockSizes s{};
    s.N = 1, s.H = H, s.W = W, s.kernel = k, s.stride = stride, s.dilation = dilation;
    s.pad_top = top, s.pad_left = left;
    s.H_out = (H - 1) / stride + 1, s.W_out = (W - 1) / stride + 1;
    s.in_channels = c.in, s.hidden_channels = c.hidden, s.out_channels = c.out;
    s.expansion = c.in != c.hidden;
    s.residual = stride == 1 && c.in == c.out && number % 4 != 3;
    s.clip_expand = s.clip_dw = kClips[number % 5 == 4 ? 2 : number % 5 == 3];
    s.clip_project = kClips[number % 2 == 0 ? 2 : 0];
    std::printf("%ldx%ldx%ld %ldx%ld k%ld s%ld d%ld element %d number %d\n", long(c.in),
                long(c.hidden), long(c.out), long(H), long(W), long(k), long(stride),
                long(dilation), int(element), number);
    Memory memory(number % 2 == 0);
    Image x{H, W, c.in, random_numbers(engine, H * W * c.in, 2)};
    if (number % 7 == 6) x.at[engine() % x.at.size()] = NAN;
    Network network{memory, engine, element, {}, x};
    network.add_block(s, number % 6 != 5, number % 8 >= 4, number % 7 == 5);
    check(network, memory.constants(x.at, element), tolerance_of(element));
}

void check_blocks(std::mt19937& engine) {
    constexpr Channels kSmall[] = {{8, 48, 8}, {3, 7, 5},    {17, 33, 9}, {16, 16, 24},
                                   {5, 5, 5},  {24, 72, 24}, {1, 2, 1},   {12, 70, 43}};
    constexpr int64_t kSizes[][2] = {{1, 1}, {7, 7}, {13, 10}, {5, 21}};
    int number = 0;
    for (const Element element : {Element::single, Element::bfloat16, Element::half})
        for (const Channels& c : kSmall)
            for (const auto& [H, W] : kSizes)
                for (int i = 0; i < 8; i++)
                    check_block(engine, number++, c, H, W, i & 1 ? 5 : 3, i & 2 ? 2 : 1,
                                i & 4 ? 2 : 1, element);
    for (const Element element : {Element::single, Element::bfloat16}) {
        for (const int64_t stride : {1, 2}) {
            check_block(engine, number++, {96, 576, 96}, 14, 13, 3, stride, 1, element);
            check_block(engine, number++, {160, 960, 160}, 7, 7, 3, stride, 1, element);
            check_block(engine, number++, {16, 96, 24}, 18, 301, 3, stride, 1, element);
            check_block(engine, number++, {8, 144, 8}, 9, 402, 5, stride, 1, element);
        }
    }
}

void check_network(std::mt19937& engine, int number, int64_t H, int64_t W, Element element) {
    std::printf("network %d %ldx%ld element %d\n", number, long(H), long(W), int(element));
    Memory memory(number % 2 == 0);
    const Image x{H, W, 3, random_numbers(engine, H * W * 3, 2)};
    Network network{memory, engine, element, {}, x};
    network.add_stem(number % 3 == 0 ? 13 : 8, number % 3);
    const auto add = [&](int64_t ratio, int64_t channels, int64_t k, int64_t stride) {
        const Image& y = network.result;
        BlockSizes s{};
        s.N = 1, s.H = y.H, s.W = y.W, s.kernel = k, s.stride = stride, s.dilation = 1;
        s.pad_top = s.pad_left = k / 2;
        s.H_out = (y.H - 1) / stride + 1, s.W_out = (y.W - 1) / stride + 1;
        s.in_channels = y.channels, s.hidden_channels = ratio * y.channels;
        s.out_channels = channels, s.expansion = ratio > 1;
        s.residual = stride == 1 && channels == y.channels;
        s.clip_expand = s.clip_dw = kClips[0], s.clip_project = kClips[2];
        network.add_block(s, true, true);
    };
    add(1, 8, 3, 1);
    add(6, 12, 3, 2);
    add(6, 12, 5, 1);
    if (number % 2 == 1) network.add_pool(12, false);
    add(3, 12, 3, 1);
    add(6, 21, 3, 2);
    add(4, 21, 3, 1);
    network.add_pool(number % 4 == 3 ? 0 : 70);
    network.add_linear(11);
    // 16 bits round the result of every layer.
    check(network, memory.constants(x.at, element), 5 * tolerance_of(element));
}

void check_networks(std::mt19937& engine) {
    constexpr int64_t kSizes[][2] = {{33, 40}, {24, 9}, {3, 3}, {51, 64}, {7, 70}};
    int number = 0;
    for (const Element element : {Element::single, Element::bfloat16, Element::half})
        for (const auto& [H, W] : kSizes) check_network(engine, number++, H, W, element);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = count == 2 ? arguments[1] : "";
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    std::mt19937 engine(1);
    if (what == "blocks") {
        check_blocks(engine);
    } else if (what == "networks") {
        check_networks(engine);
    } else if (what == "overrun") {
        Memory memory(true);
        auto* const numbers = static_cast<volatile float*>(memory.allocate(40));
        numbers[9] = 1;
        std::printf("one number more\n");
        numbers[10] = 1;
    } else {
        std::printf("driver: expected blocks, networks or overrun\n");
        return 2;
    }
    std::printf(
        "%s: calls %ld low %ld high %ld streams %ld in-place %ld groups %ld chunks %ld"
        " strips %ld\n",
        kernel().name, long(counts.calls), long(counts.low), long(counts.high),
        long(counts.streams), long(counts.in_place), long(counts.groups), long(counts.chunks),
        long(counts.strips));
    return 0;
}
