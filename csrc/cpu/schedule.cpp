#include "schedule.h"

#include <algorithm>

#include "sizes.h"

namespace mnv2::cpu {

namespace {

constexpr int64_t kChunkMultiple = 16;  // hidden channels: whole cache lines, whole vectors
constexpr int64_t kChunkBytes = 112 * 1024;
constexpr int64_t kInPlaceChunkBytes = 160 * 1024;  // depthwise rows alone
constexpr int64_t kImageBytes = 512 * 1024;  // x and y of more than this are walked through once
constexpr int64_t kWeightBytes = 64 * 1024;  // provided that the weights are no more than this
constexpr int64_t kSumBytes = 80 * 1024;     // of a band
constexpr int64_t kPartialFloats = 64 * 320;
constexpr int64_t kMinStripCols = 32;  // narrower ones expand too much of their margins twice
constexpr int64_t kGoodChunk = 48;  // three vectors: what register tiles of products are full with

int64_t input_cols(const BlockArgs& args, int64_t strip_cols) {
    return std::min(args.W, window_cols(args, strip_cols));
}

// Of expansion or dense convolution, and projection; as floats.
int64_t weight_bytes_of(const BlockArgs& args) {
    return 4 * args.hidden_channels * (weights_of_channel(args) + args.out_channels);
}

// Whether sums are kept in scratch until y is made of them.
bool sums_apart(const BlockArgs& args) {
    return args.element != Element::single || (args.gate.width > 0 && args.residual);
}

}  // namespace

Ring ring_of(const BlockArgs& args, int64_t rows_per_step) {
    const int64_t window = window_rows(args, rows_per_step);
    const int64_t new_rows = rows_per_step * args.stride;
    const bool one_step = rows_per_step >= args.H_out;
    return {window, new_rows, one_step ? window : round_up(window, new_rows)};
}

std::pair<int64_t, int64_t> hidden_range(const BlockArgs& args, const Schedule& schedule,
                                         int64_t lanes, int64_t group) {
    const int64_t vectors = ceil_div(args.hidden_channels, lanes);
    const int64_t begin = group * vectors / schedule.hidden_groups * lanes;
    const int64_t end = (group + 1) * vectors / schedule.hidden_groups * lanes;
    return {begin, std::min(end, args.hidden_channels)};
}

bool reads_x_in_place(const BlockArgs& args, int64_t lanes) {
    return !args.expansion && !args.dense && args.in_channels % lanes == 0;
}

bool copies_x(const BlockArgs& args) {
    const bool narrow = args.element != Element::single;
    const bool is_pointwise = args.kernel_size == 1 && args.stride == 1;
    return args.dense ? narrow || !is_pointwise : narrow && args.expansion && !args.pairs;
}

GateLayout gate_layout(const BlockArgs& args, const Schedule& schedule, int64_t lanes) {
    if (args.gate.width == 0) return {};
    const int64_t width = round_up(args.hidden_channels, lanes);
    GateLayout layout{};
    layout.sums = aligned(args.H_out * args.W_out * width);
    layout.means = layout.sums + aligned(ceil_div(args.H_out, schedule.rows_per_step) * width);
    layout.squeezed = layout.means + aligned(width);
    layout.gate = layout.squeezed + aligned(args.gate.width);
    layout.total = layout.gate + aligned(width);
    return layout;
}

int64_t interleaved_columns(int64_t columns, int64_t lanes) {
    if (lanes < 16) return 0;
    if (columns <= 16) return columns % 8 == 0 ? columns : 0;
    if (columns % 16 != 8) return 0;
    return columns == 40 ? 40 : 24;
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
        end += aligned(floats);
        return begin;
    };
    layout.chunk_weights_stride = aligned((taps_of_channel(args) + 2) * chunk);
    layout.chunk_weights = piece(copies * layout.chunk_weights_stride);
    const int64_t slots = ring_of(args, schedule.rows_per_step).slots;
    const bool has_ring = !args.dense && !reads_x_in_place(args, lanes);
    const int64_t cols = input_cols(args, schedule.strip_cols);
    const int64_t ring = has_ring ? slots * cols * chunk : 0;
    layout.ring_stride = aligned(ring);
    layout.ring = piece(copies * layout.ring_stride);
    const bool gated = args.gate.width > 0;
    layout.depthwise = piece(gated ? 0 : schedule.rows_per_step * schedule.strip_cols * chunk);
    const bool narrow = args.element != Element::single;
    const int64_t in_memory = args.pairs ? 2 : 1;  // numbers in the place of a float
    const int64_t depth = args.dense       ? args.kernel_size * args.in_channels
                          : args.expansion ? args.in_channels / in_memory
                                           : 0;
    const int64_t expand = narrow ? depth * chunk : 0;
    const int64_t project =
        narrow || (gated && gates_weights(args)) ? chunk / in_memory * args.out_channels : 0;
    layout.expand_panel = piece(expand);
    layout.project_panel = piece(project);
    layout.interleaved = piece(narrow ? 0 : chunk * interleaved_columns(args.out_channels, lanes));
    layout.panels_stride = end - layout.expand_panel;
    piece((copies - 1) * layout.panels_stride);
    const int64_t window = window_rows(args, schedule.rows_per_step);
    const int64_t x_cols = args.dense ? window_cols(args, schedule.strip_cols) : cols;
    layout.x_rows = piece(copies_x(args) ? window * x_cols * args.in_channels : 0);
    const int64_t sum_rows = schedule.rows_outside ? schedule.rows_per_step : schedule.band_rows;
    const bool sums = sums_apart(args) && schedule.hidden_groups == 1;
    layout.sums = piece(sums ? sum_rows * schedule.strip_cols * args.out_channels : 0);
    const int64_t groups = schedule.hidden_groups;
    layout.partial = piece(groups > 1 ? (narrow ? groups : groups - 1) * y_numbers(args) : 0);
    layout.total = end;
    return layout;
}

Schedule choose_schedule(const BlockArgs& args, int64_t lanes) {
    Schedule schedule{};
    schedule.strip_cols = args.W_out;
    schedule.band_rows = args.H_out;

    // Two rows share the input of a stride-1 depthwise. Narrow images take more rows, to fill the
    // register tiles of the products and to use each weight more often once it is in L1.
    const bool one_row = args.stride == 2 && args.W_out >= 28;
    const int64_t rows = args.W_out <= 8 ? kMaxRowsPerStep : args.W_out <= 16 ? 4 : one_row ? 1 : 2;
    schedule.rows_per_step = std::min(rows, args.H_out);

    // A small image cannot be cut into bands without expanding much of it twice; two groups of
    // hidden channels cost one more pass over y.
    const int64_t pixels_out = args.H_out * args.W_out;
    const bool small = pixels_out <= 64 && pixels_out * args.out_channels <= kPartialFloats;
    // The two parts of a block with a gate are cut by chunks and by rows instead.
    const bool gated = args.gate.width > 0;
    schedule.hidden_groups = small && args.hidden_channels >= 256 && !gated ? 2 : 1;

    const auto scratch = [&] { return 4 * scratch_layout(args, schedule, lanes).total; };
    const auto set_chunks = [&](int64_t count) {
        const int64_t group = ceil_div(args.hidden_channels, schedule.hidden_groups);
        schedule.hidden_chunk = round_up(ceil_div(group, count), kChunkMultiple);
    };
    // The widest chunks whose rows in flight stay well inside L2, in even parts: wide chunks touch
    // y less often. A small image gets by with less than the tensors that are to be saved.
    const int64_t expanded_bytes = 4 * args.H * args.W * args.hidden_channels;
    const int64_t limit = reads_x_in_place(args, lanes) ? kInPlaceChunkBytes : kChunkBytes;
    const int64_t chunk_bytes = std::min(limit, expanded_bytes / 4);
    const auto choose_chunks = [&](int64_t most) {
        schedule.rows_outside = false;
        set_chunks(1);
        for (int64_t count = 2; schedule.hidden_chunk > kChunkMultiple; count++) {
            // Panels of weights come on top, but may not drive a chunk out of its scratch.
            const int64_t in_flight = 4 * scratch_layout(args, schedule, lanes).expand_panel;
            if (in_flight <= chunk_bytes && scratch() <= most) return;
            set_chunks(count);
        }
    };

    // Large images with small weights are walked through once, in strips of columns narrow enough
    // for the rows in flight of all chunks.
    const int64_t image_bytes =
        4 * (args.H * args.W * args.in_channels + pixels_out * args.out_channels);
    const int64_t weight_bytes = weight_bytes_of(args);
    if (image_bytes > kImageBytes && weight_bytes <= kWeightBytes && !gated) {
        for (; schedule.strip_cols >= kMinStripCols;
             schedule.strip_cols = ceil_div(schedule.strip_cols, 2)) {
            choose_chunks(INT64_MAX);
            schedule.rows_outside = true;
            const bool wide = schedule.hidden_chunk >= std::min(kGoodChunk, args.hidden_channels);
            if (wide && scratch() <= kScratchBytes) return schedule;
        }
        schedule.strip_cols = args.W_out;
    }

    // Otherwise chunk by chunk; extreme widths with fewer rows at a time, then in strips. Where
    // sums are apart, or there is a gate, sums and panels of weights need room, and copies of x do
    // where there is a dense convolution: first that for a second group of hidden channels is given
    // up, then sums of many rows.
    const bool apart = sums_apart(args);
    const auto over = [&] { return scratch() > kScratchBytes; };
    const int64_t rows_of_sums =
        round_up(ceil_div(kSumBytes, 4 * args.W_out * args.out_channels), schedule.rows_per_step);
    choose_chunks(apart || gated || args.dense ? kScratchBytes : INT64_MAX);
    if (apart && over()) schedule.hidden_groups = 1;
    if (apart && schedule.hidden_groups == 1) {
        schedule.band_rows = std::min(rows_of_sums, args.H_out);
        choose_chunks(kScratchBytes);
    }
    const auto halve = [](int64_t& n, int64_t least) { n = std::max(ceil_div(n, 2), least); };
    while (over() && schedule.band_rows > schedule.rows_per_step && apart &&
           schedule.hidden_groups == 1)
        halve(schedule.band_rows, schedule.rows_per_step);
    while (over() && schedule.rows_per_step > 1) {
        halve(schedule.rows_per_step, 1);
        if (apart) schedule.band_rows = std::min(schedule.band_rows, schedule.rows_per_step);
    }
    while (over() && schedule.strip_cols > 1 && !gated) halve(schedule.strip_cols, 1);
    return schedule;
}

Schedule choose_network_schedule(const BlockArgs& args, int64_t lanes) {
    const Schedule alone = choose_schedule(args, lanes);
    const int64_t weight_bytes = weight_bytes_of(args);
    const bool whole_rows = alone.rows_outside && alone.strip_cols == args.W_out;
    if (whole_rows || alone.hidden_groups > 1 || weight_bytes > kWeightBytes || args.gate.width > 0)
        return alone;
    Schedule schedule = alone;
    schedule.rows_outside = true;
    schedule.strip_cols = args.W_out;
    schedule.hidden_chunk = std::min(round_up(args.hidden_channels, kChunkMultiple), kGoodChunk);
    const int64_t bytes = 4 * scratch_layout(args, schedule, lanes).total;
    return bytes <= kNetworkScratchBytes ? schedule : alone;
}

bool gates_weights(const BlockArgs& args) { return args.H_out * args.W_out > args.out_channels; }

bool keeps_row_by_row(const BlockArgs& args, const Schedule& schedule) {
    return args.gate.width > 0 && schedule.hidden_chunk >= args.hidden_channels;
}

std::string to_string(const BlockArgs& args, const Schedule& schedule, int64_t lanes) {
    const auto n = [](int64_t value) { return std::to_string(value); };
    const int64_t bytes = 4 * scratch_layout(args, schedule, lanes).total;
    return n(args.H) + "x" + n(args.W) + " " + n(args.in_channels) + "-" + n(args.hidden_channels) +
           "-" + n(args.out_channels) + " k" + n(args.kernel_size) + " s" + n(args.stride) + ": " +
           (schedule.rows_outside ? "rows" : "chunks") + " outside, hidden_chunk " +
           n(schedule.hidden_chunk) + ", rows_per_step " + n(schedule.rows_per_step) +
           ", strip_cols " + n(schedule.strip_cols) + ", band_rows " + n(schedule.band_rows) +
           ", hidden_groups " + n(schedule.hidden_groups) + ", scratch " + n(bytes) + " bytes";
}

}  // namespace mnv2::cpu
