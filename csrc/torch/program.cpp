#include "program.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "host.h"

namespace mnv2::cpu {

namespace {

at::ScalarType dtype_of(Element element) {
    return element == Element::single ? at::kFloat
           : element == Element::half ? at::kHalf
                                      : at::kBFloat16;
}

// How many numbers a tensor of these sizes has, all of them at least 1; raises where that is so
// many that sums over tensors, in bytes and for every thread, could overflow.
int64_t count_of(std::initializer_list<int64_t> sizes) {
    constexpr int64_t most = int64_t{1} << 40;
    int64_t count = 1;
    for (const int64_t size : sizes) {
        TORCH_CHECK_VALUE(count <= most / size,
                          "run_plan: every tensor of program must have at most ", most,
                          " numbers, got one of ", at::IntArrayRef(sizes));
        count *= size;
    }
    return count;
}

// Reads a plan from the front: the order here is that of `Program` in mnv2_kernels/program.py.
class Program {
 public:
    Program(at::IntArrayRef integers, at::ArrayRef<double> bounds, const WeightList* weights,
            Element element)
        : element(element), integers_(integers), bounds_(bounds), weights_(weights) {}

    const Element element;

    int64_t integer() {
        TORCH_CHECK_VALUE(next_integer_ < integers_.size(), "run_plan: program ends too early");
        return integers_[next_integer_++];
    }
    int64_t size() {
        const int64_t value = integer();
        TORCH_CHECK_VALUE(value >= 1 && value < int64_t{1} << 31,
                          "run_plan: sizes in program must be at least 1, got ", value);
        return value;
    }
    Clip clip() {
        TORCH_CHECK_VALUE(next_bound_ + 2 <= bounds_.size(), "run_plan: bounds end too early");
        const double lower = bounds_[next_bound_], upper = bounds_[next_bound_ + 1];
        TORCH_CHECK_VALUE(lower <= upper, "run_plan: bounds[", next_bound_,
                          "] and the next must be lower <= upper, got ", lower, " and ", upper);
        next_bound_ += 2;
        return {static_cast<float>(lower), static_cast<float>(upper)};
    }
    const void* weight(std::initializer_list<int64_t> sizes) {
        return next_weight(count_of(sizes), dtype_of(element), false);
    }
    const float* bias(int64_t count) {
        return static_cast<const float*>(next_weight(count, at::kFloat, true));
    }
    void check_end() const {
        TORCH_CHECK_VALUE(next_integer_ == integers_.size() && next_bound_ == bounds_.size() &&
                              (weights_ == nullptr || next_weight_ == weights_->size()),
                          "run_plan: program, bounds and weights must end with the last step");
    }

 private:
    // The next tensor of weights; nullptr where it may be missing and is. Without weights, for a
    // program that is only described, something that is not nullptr: layouts ask for no more.
    const void* next_weight(int64_t count, at::ScalarType dtype, bool optional) {
        static constexpr char kUnread = 0;
        if (weights_ == nullptr) return optional ? nullptr : &kUnread;
        TORCH_CHECK_VALUE(next_weight_ < weights_->size(), "run_plan: weights end too early");
        const size_t number = next_weight_++;
        const std::optional<at::Tensor> weight = weights_->get(number);
        if (!weight.has_value()) {
            TORCH_CHECK_VALUE(optional, "run_plan: weights[", number,
                              "] must be a tensor, got None");
            return nullptr;
        }
        TORCH_CHECK_VALUE(weight->is_cpu() && weight->scalar_type() == dtype &&
                              weight->is_contiguous() && weight->numel() == count,
                          "run_plan: weights[", number, "] must be ", count,
                          " contiguous numbers of ", dtype, " on the CPU, got ", weight->numel(),
                          " of ", weight->scalar_type(), " on ", weight->device());
        check_memory("run_plan", "weights[" + std::to_string(number) + "]", *weight);
        return weight->const_data_ptr();
    }

    at::IntArrayRef integers_;
    at::ArrayRef<double> bounds_;
    const WeightList* weights_;
    size_t next_integer_ = 0, next_bound_ = 0, next_weight_ = 0;
};

StemArgs read_stem(Program& p) {
    StemArgs stem{};
    stem.element = p.element;
    stem.H = p.size(), stem.W = p.size();
    stem.H_out = p.size(), stem.W_out = p.size();
    stem.in_channels = p.size(), stem.out_channels = p.size();
    stem.pad_top = p.integer(), stem.pad_left = p.integer();
    stem.weight = p.weight({3, 3, stem.in_channels, stem.out_channels});
    stem.bias = p.bias(stem.out_channels);
    stem.clip = p.clip();
    return stem;
}

// The schedule is chosen once the sizes are known to be right.
BlockStep read_block(Program& p) {
    BlockArgs args{};
    args.element = p.element;
    args.H = p.size(), args.W = p.size();
    args.H_out = p.size(), args.W_out = p.size();
    args.in_channels = p.size(), args.hidden_channels = p.size(), args.out_channels = p.size();
    args.kernel = p.size(), args.stride = p.size(), args.dilation = p.size();
    args.pad_top = p.integer(), args.pad_left = p.integer();
    args.residual = p.integer() != 0, args.expansion = p.integer() != 0;
    args.N = 1;
    const int64_t hidden = args.hidden_channels;
    if (args.expansion) {
        args.w_expand = p.weight({args.in_channels, hidden});
        args.b_expand = p.bias(hidden);
    }
    args.w_dw = p.weight({args.kernel, args.kernel, hidden});
    args.b_dw = p.bias(hidden);
    args.w_project = p.weight({hidden, args.out_channels});
    args.b_project = p.bias(args.out_channels);
    args.clip_expand = p.clip(), args.clip_dw = p.clip(), args.clip_project = p.clip();
    return {args, {}};
}

PoolArgs read_pool(Program& p, bool averages, const Kernel& kernel) {
    PoolArgs pool{};
    pool.element = p.element;
    pool.averages = averages;
    pool.H = p.size(), pool.W = p.size();
    pool.in_channels = p.size(), pool.out_channels = p.size();
    const bool convolves = !averages || p.integer() != 0;
    pool.weight = convolves ? p.weight({pool.in_channels, pool.out_channels}) : nullptr;
    pool.bias = convolves ? p.bias(pool.out_channels) : nullptr;
    pool.clip = p.clip();
    TORCH_CHECK_VALUE(convolves || pool.in_channels == pool.out_channels,
                      "run_plan: a mean alone keeps the number of channels");
    pool.pairs = kernel.multiplies_pairs(pool);
    return pool;
}

LinearArgs read_linear(Program& p) {
    LinearArgs linear{};
    linear.element = p.element;
    linear.in_features = p.size(), linear.out_features = p.size();
    linear.weight = p.weight({linear.in_features, linear.out_features});
    linear.bias = p.bias(linear.out_features);
    return linear;
}

#define CHECK_STEP(condition, ...) \
    TORCH_CHECK_VALUE(condition, "run_plan: step ", number, " ", __VA_ARGS__)

// A tensor between two steps: where it is in the arena, -1: not there, and its shape.
struct Between {
    int64_t offset, channels, H, W;
    int64_t size() const { return channels * H * W; }
};

bool is_output_size(int64_t out, int64_t size, int64_t pad, int64_t stride, int64_t extent) {
    if (pad < 0 || pad > extent) return false;
    const int64_t after = (out - 1) * stride + 1 + extent - pad - size;
    return after <= extent && after > -stride;
}

// The shape behind a step, once it fits the one before it.
Between check_sizes(const Step& step, int64_t number, const Between& x) {
    if (const auto* stem = std::get_if<StemArgs>(&step.layer)) {
        CHECK_STEP(number == 0, "is a stem, which must be the first one");
        CHECK_STEP(stem->in_channels == x.channels && stem->H == x.H && stem->W == x.W &&
                       is_output_size(stem->H_out, x.H, stem->pad_top, 2, 2) &&
                       is_output_size(stem->W_out, x.W, stem->pad_left, 2, 2),
                   "does not fit its input");
        return {-1, stem->out_channels, stem->H_out, stem->W_out};
    }
    if (const auto* block = std::get_if<BlockStep>(&step.layer)) {
        const BlockArgs& args = block->args;
        const bool known =
            (args.kernel == 3 || args.kernel == 5) && args.stride <= 2 && args.dilation <= 2;
        CHECK_STEP(known, "must have kernel 3 or 5, stride 1 or 2, dilation 1 or 2");
        const int64_t extent = args.dilation * (args.kernel - 1);
        CHECK_STEP(args.in_channels == x.channels && args.H == x.H && args.W == x.W &&
                       is_output_size(args.H_out, x.H, args.pad_top, args.stride, extent) &&
                       is_output_size(args.W_out, x.W, args.pad_left, args.stride, extent) &&
                       (args.expansion || args.hidden_channels == args.in_channels),
                   "does not fit its input");
        count_of({args.hidden_channels, args.H, args.W});
        const Between y{-1, args.out_channels, args.H_out, args.W_out};
        CHECK_STEP(!args.residual || (y.channels == x.channels && y.H == x.H && y.W == x.W),
                   "has a residual of another shape than its result");
        return y;
    }
    if (const auto* pool = std::get_if<PoolArgs>(&step.layer)) {
        CHECK_STEP(pool->in_channels == x.channels && pool->H == x.H && pool->W == x.W,
                   "does not fit its input");
        if (!pool->averages) return {-1, pool->out_channels, pool->H, pool->W};
        return {-1, pool->out_channels, 1, 1};
    }
    const auto& linear = std::get<LinearArgs>(step.layer);
    CHECK_STEP(linear.in_features == x.size(), "does not fit its input");
    return {-1, linear.out_features, 1, 1};
}

bool may_overwrite_input(const Step& step) {
    const auto* block = std::get_if<BlockStep>(&step.layer);
    return block && is_row_by_row(step) && block->args.residual && block->args.expansion;
}

// Everything that a kernel takes for granted of where results are; shapes[0] is that of x, the next
// ones are those behind the steps.
void check_places(const Network& network, const std::vector<Between>& shapes) {
    Between in_memory = shapes[0];  // what the steps that stream into one another began with
    bool comes_streaming = false;
    const auto count = static_cast<int64_t>(network.steps.size());
    for (int64_t number = 0; number < count; number++) {
        const Step& step = network.steps[number];
        const bool last = number + 1 == count;
        Between x = shapes[number + 1];
        CHECK_STEP((!comes_streaming && !step.streams) || is_row_by_row(step),
                   "cannot stream: it does not go through the image row by row");
        CHECK_STEP(!step.streams || !last, "cannot stream: there is no step behind it");
        if (!last && !step.streams) {
            x.offset = step.output;
            CHECK_STEP(x.offset >= 0 && x.offset % 16 == 0 && x.offset <= network.arena - x.size(),
                       "has its result outside of the arena of ", network.arena, " numbers");
            const bool apart = in_memory.offset == -1 ||
                               in_memory.offset + in_memory.size() <= x.offset ||
                               x.offset + x.size() <= in_memory.offset;
            const bool same = in_memory.offset == x.offset && !comes_streaming;
            CHECK_STEP(apart || (same && may_overwrite_input(step)), "overwrites its input");
        }
        if (!step.streams) in_memory = x;
        comes_streaming = step.streams;
    }
}

}  // namespace

Network read_network(at::IntArrayRef integers, at::ArrayRef<double> bounds,
                     const WeightList* weights, Element element, const Kernel& kernel) {
    Program p(integers, bounds, weights, element);
    Network network{};
    network.channels = p.size(), network.H = p.size(), network.W = p.size();
    const int64_t dims = p.size();
    TORCH_CHECK_VALUE(dims == 1 || dims == 3,
                      "run_plan: an image's result must have 1 or 3 dimensions, got ", dims);
    std::vector<int64_t> y_shape(dims);
    for (int64_t& size : y_shape) size = p.size();
    network.arena = p.integer();
    // Below this bound no sum of sizes overflows.
    TORCH_CHECK_VALUE(
        network.arena >= 0 && network.arena < int64_t{1} << 31 && network.arena % 16 == 0,
        "run_plan: the arena must have a multiple of 16 numbers, fewer than 2**31, got ",
        network.arena);
    const int64_t count = p.size();
    count_of({network.channels, network.H, network.W});
    std::vector<Between> shapes{{-1, network.channels, network.H, network.W}};
    for (int64_t number = 0; number < count; number++) {
        Step step{};
        const int64_t kind = p.integer();
        step.output = p.integer();
        step.streams = p.integer() != 0;
        switch (kind) {
            case 0: {
                const StemArgs stem = read_stem(p);
                network.y_shape = {stem.out_channels, stem.H_out, stem.W_out};
                step.layer = stem;
                break;
            }
            case 1: {
                const BlockStep block = read_block(p);
                network.y_shape = {block.args.out_channels, block.args.H_out, block.args.W_out};
                step.layer = block;
                break;
            }
            case 2:
            case 4: {
                const PoolArgs pool = read_pool(p, kind == 2, kernel);
                network.y_shape = {pool.out_channels};
                if (!pool.averages) network.y_shape = {pool.out_channels, pool.H, pool.W};
                step.layer = pool;
                break;
            }
            case 3: {
                const LinearArgs linear = read_linear(p);
                network.y_shape = {linear.out_features};
                step.layer = linear;
                break;
            }
            default:
                TORCH_CHECK_VALUE(false, "run_plan: kinds of steps are 0 to 4, got ", kind);
        }
        const Between y = check_sizes(step, number, shapes.back());
        count_of({y.channels, y.H, y.W});
        shapes.push_back(y);
        if (auto* block = std::get_if<BlockStep>(&step.layer)) {
            block->args.pairs = kernel.multiplies_pairs(block->args);
            block->schedule = choose_network_schedule(block->args, kernel.lanes);
        }
        network.steps.push_back(step);
    }
    p.check_end();
    check_places(network, shapes);
    TORCH_CHECK_VALUE(y_shape == network.y_shape, "run_plan: the result must have shape ",
                      at::IntArrayRef(network.y_shape), ", the program says ",
                      at::IntArrayRef(y_shape));
    return network;
}

}  // namespace mnv2::cpu
