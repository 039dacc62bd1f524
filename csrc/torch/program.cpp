#include "program.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <string>

#include "host.h"
#include "program_checks.h"

namespace mnv2::cpu {

namespace {

at::ScalarType dtype_of(Element element) {
    return element == Element::single ? at::kFloat
           : element == Element::half ? at::kHalf
                                      : at::kBFloat16;
}

// Reads a plan from the front: in the order of `Program` in
// mnv2_kernels/network/program.py.
class Program {
 public:
    Program(at::IntArrayRef integers, at::ArrayRef<double> bounds, const WeightList* weights,
            Element element)
        : element(element), integers_(integers), bounds_(bounds), weights_(weights) {}

    const Element element;

    int64_t integer() {
        TORCH_CHECK_VALUE(next_integer_ < integers_.size(),
                          "run_plan: program must not end before its last step, got ",
                          integers_.size(), " integers");
        return integers_[next_integer_++];
    }
    int64_t size() {
        const int64_t value = integer();
        TORCH_CHECK_VALUE(value >= 1 && value < int64_t{1} << 31,
                          "run_plan: sizes in program must be from 1 to 2**31 - 1, got ", value);
        return value;
    }
    Activation activation() {
        constexpr auto kLast = static_cast<int64_t>(Curve::gelu_tanh);
        const int64_t curve = integer();
        TORCH_CHECK_VALUE(curve >= 0 && curve <= kLast,
                          "run_plan: what follows a layer in program must be from 0 to ", kLast,
                          ", got ", curve);
        constexpr Clip kNone{-INFINITY, INFINITY};
        const Clip bounds = clip();
        return {static_cast<Curve>(curve), curve == 0 ? bounds : kNone};
    }
    Clip clip() {
        TORCH_CHECK_VALUE(next_bound_ + 2 <= bounds_.size(),
                          "run_plan: bounds must have two numbers for every clip in program, got ",
                          bounds_.size());
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
        TORCH_CHECK_VALUE(
            next_weight_ < weights_->size(),
            "run_plan: weights must have a tensor or None for every one in program, got ",
            weights_->size());
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
    stem.activation = p.activation();
    return stem;
}

GateArgs read_gate(Program& p, int64_t hidden) {
    GateArgs gate{};
    gate.width = p.size();
    gate.hard = p.integer() != 0;
    gate.w_squeeze = p.weight({hidden, gate.width});
    gate.b_squeeze = p.bias(gate.width);
    gate.w_excite = p.weight({gate.width, hidden});
    gate.b_excite = p.bias(hidden);
    gate.squeeze = p.activation();
    return gate;
}

// The schedule is chosen once the sizes are known to be right.
BlockStep read_block(Program& p) {
    BlockArgs args{};
    args.element = p.element;
    args.H = p.size(), args.W = p.size();
    args.H_out = p.size(), args.W_out = p.size();
    args.in_channels = p.size(), args.hidden_channels = p.size(), args.out_channels = p.size();
    args.kernel_size = p.size(), args.stride = p.size(), args.dilation = p.size();
    args.pad_top = p.integer(), args.pad_left = p.integer();
    args.residual = p.integer() != 0, args.expansion = p.integer() != 0;
    args.dense = p.integer() != 0;
    TORCH_CHECK_VALUE(!args.dense || !args.expansion,
                      "run_plan: a block in program must have no expansion where it is dense");
    args.N = 1;
    const int64_t hidden = args.hidden_channels;
    if (args.expansion) {
        args.w_expand = p.weight({args.in_channels, hidden});
        args.b_expand = p.bias(hidden);
    }
    if (args.dense)
        args.w_dw = p.weight({args.kernel_size, args.kernel_size, args.in_channels, hidden});
    else
        args.w_dw = p.weight({args.kernel_size, args.kernel_size, hidden});
    args.b_dw = p.bias(hidden);
    args.w_project = p.weight({hidden, args.out_channels});
    args.b_project = p.bias(args.out_channels);
    const Activation expand = p.activation(), dw = p.activation(), project = p.activation();
    args.clip_expand = expand.clip, args.clip_dw = dw.clip, args.clip_project = project.clip;
    args.curve_expand = expand.curve, args.curve_dw = dw.curve, args.curve_project = project.curve;
    if (p.integer() != 0) args.gate = read_gate(p, hidden);
    TORCH_CHECK_VALUE(!args.dense || args.gate.width == 0,
                      "run_plan: a block in program must have no gate where it is dense");
    return {args, {}};
}

using Layer = decltype(Step::layer);

// A pool is a 1x1 convolution that averages, or the mean alone.
Layer read_pointwise(Program& p, Kind kind, const Kernel& kernel) {
    PointwiseArgs args{};
    args.element = p.element;
    args.averages = kind == Kind::pool;
    args.H = p.size(), args.W = p.size();
    args.in_channels = p.size(), args.out_channels = p.size();
    if (kind == Kind::pool && p.integer() == 0) {
        TORCH_CHECK_VALUE(args.in_channels == args.out_channels,
                          "run_plan: a mean alone in program must keep the number of channels, ",
                          args.in_channels, ", got ", args.out_channels);
        p.activation();  // of the convolution that is not there
        return AverageArgs{args.H, args.W, args.in_channels, args.element};
    }
    args.weight = p.weight({args.in_channels, args.out_channels});
    args.bias = p.bias(args.out_channels);
    args.activation = p.activation();
    args.pairs = kernel.multiplies_pairs(args);
    return args;
}

LinearArgs read_linear(Program& p) {
    LinearArgs linear{};
    linear.element = p.element;
    linear.in_features = p.size(), linear.out_features = p.size();
    linear.weight = p.weight({linear.in_features, linear.out_features});
    linear.bias = p.bias(linear.out_features);
    linear.activation = p.activation();
    return linear;
}

Layer read_layer(Program& p, int64_t kind, int64_t number, const Kernel& kernel) {
    constexpr auto kLast = static_cast<int64_t>(Kind::pointwise);
    TORCH_CHECK_VALUE(kind >= 0 && kind <= kLast, "run_plan: the kind of step ", number,
                      " in program must be from 0 to ", kLast, ", got ", kind);
    switch (static_cast<Kind>(kind)) {
        case Kind::stem:
            return read_stem(p);
        case Kind::block:
            return read_block(p);
        case Kind::pool:
        case Kind::pointwise:
            return read_pointwise(p, static_cast<Kind>(kind), kernel);
        case Kind::linear:
            break;
    }
    return read_linear(p);
}

}  // namespace

Network read_network(at::IntArrayRef integers, at::ArrayRef<double> bounds,
                     const WeightList* weights, Element element, const Kernel& kernel) {
    Program p(integers, bounds, weights, element);
    Network network{};
    network.channels = p.size(), network.H = p.size(), network.W = p.size();
    const int64_t dims = p.size();
    TORCH_CHECK_VALUE(
        dims == 1 || dims == 3,
        "run_plan: the result of an image in program must have 1 or 3 dimensions, got ", dims);
    std::vector<int64_t> y_shape(dims);
    for (int64_t& size : y_shape) size = p.size();
    network.arena = p.integer();
    // Below this bound no sum of sizes overflows.
    TORCH_CHECK_VALUE(
        network.arena >= 0 && network.arena < int64_t{1} << 31 && network.arena % 16 == 0,
        "run_plan: the arena in program must have a multiple of 16 numbers, fewer than 2**31, got ",
        network.arena);
    const int64_t count = p.size();
    count_of({network.channels, network.H, network.W});
    std::vector<Between> shapes{{-1, network.channels, network.H, network.W, true}};
    for (int64_t number = 0; number < count; number++) {
        Step step{};
        const int64_t kind = p.integer();
        step.output = p.integer();
        step.streams = p.integer() != 0;
        step.kept = p.integer();
        step.layer = read_layer(p, kind, number, kernel);
        check_sizes(step, number, shapes.back());
        shapes.push_back(result_of(step));
        if (auto* block = std::get_if<BlockStep>(&step.layer)) {
            block->args.pairs = kernel.multiplies_pairs(block->args);
            block->schedule = choose_network_schedule(block->args, kernel.lanes);
        }
        network.steps.push_back(step);
    }
    p.check_end();
    // A program that is only described need not have places yet.
    check_places(network, shapes, kernel.lanes, weights != nullptr);
    const Between& y = shapes.back();
    network.y_shape = {y.channels};
    if (y.is_image) network.y_shape = {y.channels, y.H, y.W};
    TORCH_CHECK_VALUE(y_shape == network.y_shape,
                      "run_plan: program must give the result's shape, ",
                      at::IntArrayRef(network.y_shape), ", got ", at::IntArrayRef(y_shape));
    return network;
}

}  // namespace mnv2::cpu
