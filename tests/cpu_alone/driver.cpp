// The CPU kernels without torch against float64: blocks, networks of all layers, and gradients; in
// memory that ends at, or begins behind, pages that cannot be touched, or under a sanitizer.
// ../cpu_driver.py compiles it.
//
//   driver KERNEL blocks | networks | backward | threads
//   driver KERNEL overrun | masked | overflow      a fault each
//   driver KERNEL cases                    one block a line of standard input
//   driver KERNEL random SEED COUNT
//
// Exits 0 where all is right, 1 where it has printed faults, 2 where it was not run.
#include <algorithm>
#include <iostream>
#include <sstream>
#include <string>

#include "row_checks.h"

namespace {

struct Channels {
    int64_t in, hidden, out;
};

struct BlockCase {
    BlockSizes sizes;
    BlockOptions options;
    bool nan_in_x, at_end;
};

void print(const BlockCase& c) {
    const BlockSizes& s = c.sizes;
    std::printf("%ld-%ld-%ld %ldx%ld k%ld s%ld d%ld pad %ld %ld element %d\n", long(s.in_channels),
                long(s.hidden_channels), long(s.out_channels), long(s.H), long(s.W),
                long(s.kernel_size), long(s.stride), long(s.dilation), long(s.pad_top),
                long(s.pad_left), int(c.options.element));
}

void check_block(std::mt19937& engine, const BlockCase& c) {
    print(c);
    const BlockSizes& s = c.sizes;
    const Element element = c.options.element;
    Memory memory(c.at_end);
    Image x{s.H, s.W, s.in_channels, random_numbers(engine, s.H * s.W * s.in_channels, 2)};
    if (c.nan_in_x) x.at[engine() % x.at.size()] = NAN;
    Network network{memory, engine, element, {}, x};
    network.add_block(s, c.options);
    check(network, memory.constants(x.at, element), tolerance_of(element));
}

// Sizes, clips and options that change from number to number.
BlockCase numbered_case(int number, const Channels& c, int64_t H, int64_t W, int64_t k,
                        int64_t stride, int64_t dilation, Element element) {
    const int64_t extent = dilation * (k - 1);
    BlockSizes s{};
    s.N = 1, s.H = H, s.W = W, s.kernel_size = k, s.stride = stride, s.dilation = dilation;
    s.pad_top = number % 3 == 2 ? number % (extent + 1) : extent / 2;
    s.pad_left = number % 3 == 2 ? extent - s.pad_top : extent / 2;
    s.H_out = (H - 1) / stride + 1, s.W_out = (W - 1) / stride + 1;
    s.in_channels = c.in, s.hidden_channels = c.hidden, s.out_channels = c.out;
    s.expansion = c.in != c.hidden;
    s.residual = stride == 1 && c.in == c.out && number % 4 != 3;
    s.clip_expand = s.clip_dw = kClips[number % 5 == 4 ? 2 : number % 5 == 3];
    s.clip_project = kClips[number % 2 == 0 ? 2 : 0];
    const bool b = number % 6 != 5;
    BlockOptions options{element, {b, b, b}, number % 8 >= 4, number % 7 == 5 ? 3 : 0};
    if (number % 3 == 1)
        for (int i = 0; i < 4; i++) options.curves[i] = (number / 3 + i) % 5;
    if (number % 9 > 4) options.gate_width = 1 + number % 11 * 3, options.hard = number % 2;
    return {s, options, number % 7 == 6, number % 2 == 0};
}

// The same with one convolution of all channels, which may be 1x1, before the projection.
void make_dense(BlockCase& c, bool pointwise) {
    BlockSizes& s = c.sizes;
    s.dense = true, s.expansion = false;
    c.options.gate_width = 0;
    if (pointwise) s.kernel_size = 1, s.pad_top = s.pad_left = 0;
}

constexpr Channels kSmall[] = {{8, 48, 8}, {3, 7, 5},    {17, 33, 9}, {16, 16, 24},
                               {5, 5, 5},  {24, 72, 24}, {1, 2, 1},   {12, 70, 43}};
constexpr int64_t kSizes[][2] = {{1, 1}, {7, 7}, {13, 10}, {5, 21}};

void check_blocks(std::mt19937& engine) {
    int number = 0;
    const auto check = [&](const Channels& c, int64_t H, int64_t W, int64_t k, int64_t stride,
                           int64_t dilation, Element element) {
        BlockCase made = numbered_case(number, c, H, W, k, stride, dilation, element);
        if (number % 7 == 2 && dilation == 1) make_dense(made, number % 3 == 0);
        number++;
        check_block(engine, made);
    };
    for (const Element element : {Element::single, Element::bfloat16, Element::half})
        for (const Channels& c : kSmall)
            for (const auto& [H, W] : kSizes)
                for (int i = 0; i < 8; i++)
                    check(c, H, W, i & 1 ? 5 : 3, i & 2 ? 2 : 1, i & 4 ? 2 : 1, element);
    for (const Element element : {Element::single, Element::bfloat16}) {
        for (const int64_t stride : {1, 2}) {
            check({96, 576, 96}, 14, 13, 3, stride, 1, element);
            check({160, 960, 160}, 7, 7, 3, stride, 1, element);
            check({16, 96, 24}, 18, 301, 3, stride, 1, element);
            check({8, 144, 8}, 9, 402, 5, stride, 1, element);
        }
    }
}

void check_gradients(std::mt19937& engine) {
    int number = 0;
    const auto check = [&](const Channels& c, int64_t N, int64_t H, int64_t W, int i) {
        BlockCase made = numbered_case(number, c, H, W, i & 1 ? 5 : 3, i & 2 ? 2 : 1, i & 4 ? 2 : 1,
                                       Element::single);
        made.sizes.N = N;
        print(made);
        check_backward(engine, made.sizes, made.options, made.at_end, number % 3);
        check_training(engine, made.sizes, made.options, made.at_end, number++ % 3);
    };
    for (const Channels& c : kSmall)
        for (const auto& [H, W] : kSizes)
            for (int i = 0; i < 8; i++) check(c, 1 + number % 3, H, W, i);
    // More than a chunk, and than a band of rows.
    for (int i = 0; i < 4; i++) check({24, 144, 32}, 1, 56, 57, i);
    check({96, 96, 24}, 2, 40, 67, 0);
    for (const int64_t channels : {1, 5, 17, 24, 33})
        for (const int64_t pixels : {1, 3, 255, 256, 257, 700})
            check_rows(engine, pixels, channels, (channels + pixels) % 2 == 0);
    // More than the pixels that a covariance sums as floats.
    check_rows(engine, 6900, 5, true);
}

// A line: the sizes as they stand below, then biases (bits), pads, clips, and what else there is.
bool read_case(const std::string& line, BlockCase& c) {
    std::istringstream words(line);
    BlockSizes& s = c.sizes;
    int64_t bottom, right, element, biases;
    words >> s.in_channels >> s.hidden_channels >> s.out_channels >> s.expansion >> s.residual >>
        s.H >> s.W >> s.kernel_size >> s.stride >> s.dilation >> s.pad_top >> s.pad_left >>
        bottom >> right >> element >> biases >> c.options.for_network >> c.options.nan_in >>
        c.nan_in_x >> c.at_end;
    for (Clip* const clip : {&s.clip_expand, &s.clip_dw, &s.clip_project})
        for (float* const bound : {&clip->lower, &clip->upper}) {
            std::string word;
            words >> word;
            *bound = std::strtof(word.c_str(), nullptr);
        }
    const int64_t extent = s.dilation * (s.kernel_size - 1);
    s.N = 1;
    s.H_out = (s.H + s.pad_top + bottom - extent - 1) / s.stride + 1;
    s.W_out = (s.W + s.pad_left + right - extent - 1) / s.stride + 1;
    c.options.element = static_cast<Element>(element);
    for (int i = 0; i < 3; i++) c.options.biases[i] = biases >> i & 1;
    return !words.fail();
}

void check_cases(std::mt19937& engine) {
    for (std::string line; std::getline(std::cin, line);) {
        BlockCase c{};
        if (!read_case(line, c)) stop("a line is not a block");
        check_block(engine, c);
    }
}

BlockCase random_case(std::mt19937& engine) {
    const auto to = [&](int64_t most) { return 1 + static_cast<int64_t>(engine() % most); };
    for (;;) {
        BlockCase c{};
        BlockSizes& s = c.sizes;
        const int64_t channels = to(3) == 1 ? 16 * to(4) : to(70);
        s.N = to(3), s.H = to(20), s.W = to(9) == 1 ? to(150) : to(24);
        s.in_channels = channels, s.expansion = to(4) > 1;
        s.hidden_channels = !s.expansion ? channels : to(2) == 1 ? 16 * to(8) : to(150);
        s.out_channels = to(2) == 1 ? channels : to(70);
        s.kernel_size = to(3) == 1 ? 5 : to(6) == 1 ? 7 : 3;
        s.stride = to(2), s.dilation = to(4) == 1 ? 1 + to(3) : 1;
        const int64_t extent = s.dilation * (s.kernel_size - 1);
        s.pad_top = to(extent + 1) - 1, s.pad_left = to(extent + 1) - 1;
        const int64_t rows = s.H + s.pad_top + to(extent + 1) - 1;
        const int64_t cols = s.W + s.pad_left + to(extent + 1) - 1;
        s.H_out = (rows - extent - 1) / s.stride + 1, s.W_out = (cols - extent - 1) / s.stride + 1;
        if (rows <= extent || cols <= extent) continue;
        s.residual = s.H_out == s.H && s.W_out == s.W && s.in_channels == s.out_channels;
        for (Clip* const clip : {&s.clip_expand, &s.clip_dw, &s.clip_project})
            *clip = to(5) == 1 ? Clip{-1.5f, 2.5f} : kClips[to(3) - 1];
        c.options = {static_cast<Element>(to(3) - 1),
                     {to(4) > 1, to(4) > 1, to(4) > 1},
                     to(2) == 1,
                     to(8) == 1 ? static_cast<int>(to(3)) : 0};
        if (to(3) == 1)
            for (int64_t& curve : c.options.curves) curve = to(5) - 1;
        if (to(3) == 1) c.options.gate_width = to(70), c.options.hard = to(2) == 1;
        c.nan_in_x = to(8) == 1, c.at_end = to(2) == 1;
        if (to(5) == 1 && s.dilation == 1) make_dense(c, false);
        return c;
    }
}

void check_random(std::mt19937& engine, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        BlockCase c = random_case(engine);
        check_block(engine, c);
        if (i % 2 == 1) continue;
        if (c.sizes.dense || c.sizes.kernel_size > 5 || c.sizes.dilation > 2) continue;
        c.options = {Element::single, {true, true, true}, false, 0};
        const int asked = static_cast<int>(i / 2 % 3);
        check_backward(engine, c.sizes, c.options, c.at_end, asked);
        check_training(engine, c.sizes, c.options, c.at_end, asked);
        check_rows(engine, 1 + engine() % 800, 1 + engine() % 40, c.at_end);
    }
}

struct NetworkCase {
    int number;
    int64_t H, W;
    Element element;
};

void add_layers(Network& network, const NetworkCase& c) {
    const auto& [number, H, W, element] = c;
    std::printf("network %d %ldx%ld element %d\n", number, long(H), long(W), int(element));
    const int64_t curve = number % 5;
    network.add_stem(number % 3 == 0 ? 13 : 8, number % 3, curve);
    const auto add = [&](int64_t ratio, int64_t channels, int64_t k, int64_t stride,
                         int64_t gate_width = 0, bool dense = false, int64_t dilation = 1) {
        const Image& y = network.result;
        BlockSizes s{};
        s.N = 1, s.H = y.H, s.W = y.W, s.kernel_size = k, s.stride = stride;
        s.dilation = dilation, s.pad_top = s.pad_left = k / 2 * dilation;
        s.H_out = (y.H - 1) / stride + 1, s.W_out = (y.W - 1) / stride + 1;
        s.in_channels = y.channels, s.hidden_channels = ratio * y.channels;
        s.out_channels = channels, s.expansion = ratio > 1 && !dense;
        s.residual = stride == 1 && channels == y.channels;
        s.dense = dense;
        s.clip_expand = s.clip_dw = kClips[0], s.clip_project = kClips[2];
        const int64_t between = gate_width > 0 ? curve : 0;
        network.add_block(s, {network.element,
                              {true, true, true},
                              true,
                              0,
                              {between, between, 0, between},
                              gate_width,
                              number % 2 == 0});
    };
    add(1, 8, 3, 1, number % 4 == 1 ? 3 : 0);
    add(6, 12, 3, 2);
    add(6, 12, 5, 1);
    if (number % 2 == 1) network.add_pointwise(12, false, curve);
    add(3, 12, 3, 1, 5, false, number % 3 == 1 ? 3 : 1);
    if (number % 2 == 0) add(4, 16, 3, 1, 0, true);
    add(6, 21, 3, 2, number % 3 == 2 ? 17 : 0);
    add(4, 21, 3, 1);
    if (number % 4 == 3)
        network.add_average();
    else
        network.add_pointwise(70, true, curve);
    if (number % 2 == 0) network.add_linear(33, curve);
    network.add_linear(11, 0);
}

// Calls function(network, x, tolerance) for networks of all elements; `step` leaves out others.
template <class Function>
void for_networks(std::mt19937& engine, int step, const Function& function) {
    constexpr int64_t kImages[][2] = {{33, 40}, {24, 9}, {3, 3}, {51, 64}, {7, 70}};
    int number = 0;
    for (const Element element : {Element::single, Element::bfloat16, Element::half})
        for (const auto& [H, W] : kImages) {
            const NetworkCase c{number++, H, W, element};
            if (c.number % step != 0) continue;
            Memory memory(c.number % 2 == 0);
            const Image x{H, W, 3, random_numbers(engine, H * W * 3, 2)};
            Network network{memory, engine, element, {}, x};
            add_layers(network, c);
            // 16 bits round the result of every layer.
            function(network, memory.constants(x.at, element), 5 * tolerance_of(element));
        }
}

// Callers at the same time, each with threads of its own, on one network.
void check_calls_at_once(Network& network, const void* x, double tolerance) {
    constexpr int64_t kCallers = 4;
    Memory& memory = network.memory;
    const int64_t size = size_of(network.element);
    const int64_t bytes = result_size(network.steps.back()) * size;
    const void* first = nullptr;
    for (const bool stream : {false, true}) {
        const int64_t arena_size = arrange(network.steps, stream);
        std::vector<std::thread> callers;
        void* results[kCallers];
        for (int64_t i = 0; i < kCallers; i++) {
            void* const y = results[i] = memory.allocate(bytes, false, network.element);
            void* const arena = memory.allocate(arena_size * size, true);
            const int64_t threads = i % 3 + 1;
            const int64_t floats = line_floats(network.steps, kernel().lanes, threads);
            auto* const lines = static_cast<float*>(memory.allocate(floats * 4, true));
            callers.emplace_back([=, &network] {
                for (int repeat = 0; repeat < 3; repeat++)
                    run_network(kernel(), network.steps, x, y, arena, lines, threads_of(threads));
            });
            counts().calls += 3;
        }
        for (std::thread& caller : callers) caller.join();
        if (first == nullptr) first = results[0];
        for (const void* const y : results)
            if (std::memcmp(first, y, bytes) != 0) fault("bits");
    }
    compare(network.result.at, first, network.element, tolerance);
    memory.check_margins();
}

bool run(const std::string& what, const std::vector<std::string>& numbers) {
    std::mt19937 engine(1);
    if (what == "blocks") {
        check_blocks(engine);
    } else if (what == "networks") {
        for_networks(engine, 1, check);
    } else if (what == "backward") {
        check_gradients(engine);
    } else if (what == "threads") {
        setting().threads_at_once = true;
        for_networks(engine, 2, check_calls_at_once);
    } else if (what == "cases") {
        check_cases(engine);
    } else if (what == "random" && numbers.size() == 2) {
        engine.seed(std::stoul(numbers[0]));
        check_random(engine, std::stol(numbers[1]));
    } else if (what == "overrun") {
        Memory memory(true);
        auto* const floats = static_cast<volatile float*>(memory.allocate(40));
        floats[9] = 1;
        std::printf("one number more\n");
        floats[10] = 1;
    } else if (what == "masked") {
        // The last number of w_project is not there, in a row of five.
        Memory memory(false);
        BlockCase c = numbered_case(0, {3, 7, 5}, 4, 4, 3, 1, 1, Element::single);
        Network network{memory, engine, c.options.element, {}, {4, 4, 3, Numbers(48)}};
        network.add_block(c.sizes, c.options);
        auto& args = std::get<BlockStep>(network.steps[0].layer).args;
        args.w_project = memory.constants(Numbers(34), Element::single);
        check(network, memory.constants(Numbers(48), Element::single), 1);
    } else if (what == "overflow") {
        volatile int64_t large = INT64_MAX;
        large = large + 1;
    } else {
        return false;
    }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    const std::vector<std::string> words(arguments + 1, arguments + count);
    const auto* const end = kKernels + kKernelCount;
    const auto* const found = std::find_if(
        kKernels, end, [&](const Kernel* k) { return !words.empty() && words[0] == k->name; });
    if (found == end) stop("driver: the first argument must be a kernel's name");
    setting().kernel = *found;
    const bool known = words.size() >= 2 && run(words[1], {words.begin() + 2, words.end()});
    if (!known) stop("driver: the second argument must say what to check");
    const Counts& c = counts();
    std::printf(
        "%s: calls %ld low %ld high %ld streams %ld in-place %ld groups %ld chunks %ld"
        " strips %ld gates %ld curves %ld dense %ld\n",
        kernel().name, long(c.calls), long(c.low), long(c.high), long(c.streams), long(c.in_place),
        long(c.groups), long(c.chunks), long(c.strips), long(c.gates), long(c.curves),
        long(c.dense));
    return faults().empty() ? 0 : 1;
}
