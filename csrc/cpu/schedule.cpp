#include "schedule.h"

#include <algorithm>

namespace mnv2::cpu {

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

constexpr int64_t kAlignFloats = 16;  // 64 bytes

int64_t input_cols(const BlockArgs& args, int64_t strip_cols) {
    const int64_t reach = (strip_cols - 1) * args.stride + (args.kernel - 1) * args.dilation + 1;
    return std::min(args.W, reach);
}

}  // namespace

Ring ring_of(const BlockArgs& args, int64_t rows_per_step) {
    const int64_t window =
        (rows_per_step - 1) * args.stride + (args.kernel - 1) * args.dilation + 1;
    const int64_t new_rows = rows_per_step * args.stride;
    const bool one_step = rows_per_step >= args.H_out;
    return {window, new_rows, one_step ? window : round_up(window, new_rows)};
}

bool reads_x_in_place(const BlockArgs& args, int64_t lanes) {
    return args.w_expand == nullptr && args.in_channels % lanes == 0;
}

ScratchLayout scratch_layout(const BlockArgs& args, const Schedule& schedule, int64_t lanes) {
    const int64_t chunk = round_up(schedule.hidden_chunk, lanes);
    const int64_t vectors = ceil_div(args.hidden_channels, lanes);
    const int64_t group = ceil_div(vectors, schedule.hidden_groups) * lanes;
    const int64_t copies = schedule.rows_outside ? ceil_div(group, schedule.hidden_chunk) : 1;
    ScratchLayout layout{};
    int64_t end = 0;
    const auto piece = [&end](int64_t floats) {
        const int64_t begin = end;
        end += round_up(floats, kAlignFloats);
        return begin;
    };
    layout.chunk_weights_stride =
        round_up((args.kernel * args.kernel + 2) * chunk, kAlignFloats);
    layout.chunk_weights = piece(copies * layout.chunk_weights_stride);
    const int64_t slots = ring_of(args, schedule.rows_per_step).slots;
    const int64_t ring =
        reads_x_in_place(args, lanes) ? 0 : slots * input_cols(args, schedule.strip_cols) * chunk;
    layout.ring_stride = round_up(ring, kAlignFloats);
    layout.ring = piece(copies * layout.ring_stride);
    layout.depthwise = piece(schedule.rows_per_step * schedule.strip_cols * chunk);
    layout.partial =
        piece(schedule.hidden_groups > 1 ? args.H_out * args.W_out * args.out_channels : 0);
    layout.total = end;
    return layout;
}

Schedule choose_schedule(const BlockArgs& args, int64_t lanes) {
    Schedule schedule{};
    schedule.rows_outside = false;
    schedule.strip_cols = args.W_out;
    schedule.rows_per_step = args.W_out <= 28 ? std::min<int64_t>(args.H_out, 4) : 2;
    schedule.hidden_groups = 1;
    schedule.hidden_chunk = round_up(std::min<int64_t>(args.hidden_channels, 96), lanes);
    const auto fits = [&] {
        return 4 * scratch_layout(args, schedule, lanes).total <= kScratchBytes;
    };
    while (!fits() && schedule.hidden_chunk > lanes)
        schedule.hidden_chunk = round_up(schedule.hidden_chunk / 2, lanes);
    while (!fits() && schedule.rows_per_step > 1) schedule.rows_per_step /= 2;
    while (!fits() && schedule.strip_cols > 1)
        schedule.strip_cols = ceil_div(schedule.strip_cols, 2);
    return schedule;
}

std::string to_string(const BlockArgs& args, const Schedule& schedule, int64_t lanes) {
    const auto n = [](int64_t value) { return std::to_string(value); };
    const int64_t bytes = 4 * scratch_layout(args, schedule, lanes).total;
    return n(args.H) + "x" + n(args.W) + " " + n(args.in_channels) + "-" +
           n(args.hidden_channels) + "-" + n(args.out_channels) + " k" + n(args.kernel) + " s" +
           n(args.stride) + ": " + (schedule.rows_outside ? "rows" : "chunks") +
           " outside, hidden_chunk " + n(schedule.hidden_chunk) + ", rows_per_step " +
           n(schedule.rows_per_step) + ", strip_cols " + n(schedule.strip_cols) +
           ", hidden_groups " + n(schedule.hidden_groups) + ", scratch " + n(bytes) + " bytes";
}

}  // namespace mnv2::cpu
