#include "program_checks.h"

#include <c10/util/Exception.h>

#include "../cpu/sizes.h"

#define MNV2_CHECK_STEP(condition, ...) \
    TORCH_CHECK_VALUE(condition, "run_plan: step ", number, " in program ", __VA_ARGS__)

namespace mnv2::cpu {

namespace {

// Whether they do not overlap; what is not in the arena overlaps nothing.
bool are_apart(const Between& a, const Between& b) {
    return a.offset == -1 || b.offset == -1 || a.offset + a.size() <= b.offset ||
           b.offset + b.size() <= a.offset;
}

bool is_output_size(int64_t out, int64_t size, int64_t pad, int64_t stride, int64_t extent) {
    if (pad < 0 || pad > extent) return false;
    const int64_t after = (out - 1) * stride + 1 + extent - pad - size;
    return after <= extent && after > -stride;
}

// Whether the step takes x.
bool fits(const Step& step, const Between& x) {
    const auto is_x = [&x](int64_t channels, int64_t H, int64_t W) {
        return channels == x.channels && H == x.H && W == x.W;
    };
    if (const auto* stem = std::get_if<StemArgs>(&step.layer))
        return is_x(stem->in_channels, stem->H, stem->W) &&
               is_output_size(stem->H_out, x.H, stem->pad_top, 2, 2) &&
               is_output_size(stem->W_out, x.W, stem->pad_left, 2, 2);
    if (const auto* block = std::get_if<BlockStep>(&step.layer)) {
        const BlockArgs& args = block->args;
        return is_x(args.in_channels, args.H, args.W) &&
               is_output_size(args.H_out, x.H, args.pad_top, args.stride, extent(args)) &&
               is_output_size(args.W_out, x.W, args.pad_left, args.stride, extent(args)) &&
               (args.expansion || args.dense || args.hidden_channels == args.in_channels);
    }
    if (const auto* pointwise = std::get_if<PointwiseArgs>(&step.layer))
        return is_x(pointwise->in_channels, pointwise->H, pointwise->W);
    if (const auto* average = std::get_if<AverageArgs>(&step.layer))
        return is_x(average->channels, average->H, average->W);
    return std::get<LinearArgs>(step.layer).in_features == x.size();
}

// Whether a step may write its result over its input, in the same place.
bool may_overwrite_input(const Step& step) {
    const auto* block = std::get_if<BlockStep>(&step.layer);
    if (!block) return false;
    const bool row_by_row = is_row_by_row(step) && block->args.residual && block->args.expansion;
    return row_by_row || block->args.gate.width > 0;
}

// Whether its input is not read any more when the first result is written.
bool is_done_with_input(const Step& step) {
    const auto* block = std::get_if<BlockStep>(&step.layer);
    return block && block->args.gate.width > 0 && !block->args.residual;
}

}  // namespace

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

Between result_of(const Step& step) {
    if (const auto* stem = std::get_if<StemArgs>(&step.layer))
        return {-1, stem->out_channels, stem->H_out, stem->W_out, true};
    if (const auto* block = std::get_if<BlockStep>(&step.layer))
        return {-1, block->args.out_channels, block->args.H_out, block->args.W_out, true};
    if (const auto* average = std::get_if<AverageArgs>(&step.layer))
        return {-1, average->channels, 1, 1, false};
    if (const auto* linear = std::get_if<LinearArgs>(&step.layer))
        return {-1, linear->out_features, 1, 1, false};
    const auto& pointwise = std::get<PointwiseArgs>(step.layer);
    if (pointwise.averages) return {-1, pointwise.out_channels, 1, 1, false};
    return {-1, pointwise.out_channels, pointwise.H, pointwise.W, true};
}

void check_sizes(const Step& step, int64_t number, const Between& x) {
    MNV2_CHECK_STEP(!std::holds_alternative<StemArgs>(step.layer) || number == 0,
                    "is a stem, which must be the first one");
    const auto* const block = std::get_if<BlockStep>(&step.layer);
    if (block) {
        const BlockArgs& args = block->args;
        const bool known = is_known_window(args.kernel_size, args.dilation, args.dense);
        MNV2_CHECK_STEP(
            known && args.stride <= 2,
            "must have kernel_size 3, 5 or 7, stride 1 or 2, and a dilation of at most ",
            kMaxExtent,
            " / (kernel_size - 1); a dense one kernel_size 1, 3 or 5 and"
            " dilation 1");
    }
    MNV2_CHECK_STEP(fits(step, x), "does not fit its input");
    const Between y = result_of(step);
    if (block) {
        count_of({block->args.hidden_channels, block->args.H, block->args.W});
        MNV2_CHECK_STEP(
            !block->args.residual || (y.channels == x.channels && y.H == x.H && y.W == x.W),
            "has a residual of another shape than its result");
    }
    count_of({y.channels, y.H, y.W});
}

void check_places(const Network& network, const std::vector<Between>& shapes, int64_t lanes,
                  bool placed) {
    Between in_memory = shapes[0];  // what the steps that stream into one another began with
    bool comes_streaming = false;
    const auto count = static_cast<int64_t>(network.steps.size());
    for (int64_t number = 0; number < count; number++) {
        const Step& step = network.steps[number];
        const bool last = number + 1 == count;
        Between x = shapes[number + 1];
        MNV2_CHECK_STEP(
            (!comes_streaming || takes_rows(step)) && (!step.streams || is_row_by_row(step)),
            "cannot stream: it does not go through the image row by row");
        MNV2_CHECK_STEP(!step.streams || !last, "cannot stream: there is no step after it");
        if (!placed) {
            comes_streaming = step.streams;
            continue;
        }
        if (!last && !step.streams) {
            x.offset = step.output;
            MNV2_CHECK_STEP(
                x.offset >= 0 && x.offset % 16 == 0 && x.offset <= network.arena - x.size(),
                "has its result outside of the arena of ", network.arena, " numbers");
            const bool apart = are_apart(in_memory, x);
            const bool same = in_memory.offset == x.offset && !comes_streaming;
            const bool over = same && may_overwrite_input(step);
            MNV2_CHECK_STEP(apart || over || (!comes_streaming && is_done_with_input(step)),
                            "overwrites its input");
        }
        if (const int64_t size = kept_elements(step, lanes); size > 0) {
            const Between kept{step.kept, size, 1, 1, false};
            MNV2_CHECK_STEP(
                kept.offset >= 0 && kept.offset % 16 == 0 && kept.offset <= network.arena - size,
                "keeps what its gate multiplies outside of the arena of ", network.arena,
                " numbers");
            MNV2_CHECK_STEP(are_apart(kept, in_memory) && are_apart(kept, x),
                            "keeps what its gate multiplies over its input or its result");
        }
        if (!step.streams) in_memory = x;
        comes_streaming = step.streams;
    }
}

}  // namespace mnv2::cpu
