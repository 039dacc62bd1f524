#include "network.h"

#include <algorithm>
#include <utility>

#include "sizes.h"

namespace mnv2::cpu {

namespace {

const BlockStep* block_of(const Step& step) { return std::get_if<BlockStep>(&step.layer); }

bool has_gate(const Step& step) {
    const auto* block = block_of(step);
    return block && block->args.gate.width > 0;
}

Element element_of(const BlockStep& block) { return block.args.element; }
template <class Args>
Element element_of(const Args& args) {
    return args.element;
}
Element element_of(const Step& step) {
    return std::visit([](const auto& layer) { return element_of(layer); }, step.layer);
}

// Of a step that goes through the image row by row.
int64_t rows_of(const Step& step) {
    if (const auto* block = block_of(step)) return block->args.H_out;
    return std::get<StemArgs>(step.layer).H_out;
}
int64_t row_bytes(const Step& step) {
    if (const auto* block = block_of(step)) return y_row_bytes(block->args);
    const auto& stem = std::get<StemArgs>(step.layer);
    return size_of(stem.element) * stem.W_out * stem.out_channels;
}
int64_t rows_per_step(const Step& step) {
    const auto* block = block_of(step);
    return block ? block->schedule.rows_per_step : 1;
}

// Rows of a streamed tensor in memory: those that the next step reads at once, and those that come
// too early because they are made a few at a time.
int64_t line_slots(const Step& step, const BlockStep& next) {
    const int64_t window = window_rows(next.args, next.schedule.rows_per_step);
    return std::min(window + rows_per_step(step) - 1, rows_of(step));
}

// Floats of a block's scratch; its sums follow it where they are not kept in y.
int64_t block_floats(const BlockStep& block, int64_t lanes) {
    return aligned(scratch_layout(block.args, block.schedule, lanes).total);
}

int64_t scratch_floats(const Step& step, int64_t lanes) {
    if (const auto* block = block_of(step)) {
        const BlockArgs& args = block->args;
        const bool sums = args.element == Element::single;
        const int64_t rows = block->schedule.rows_per_step;
        return block_floats(*block, lanes) +
               aligned(sums ? rows * args.W_out * args.out_channels : 0);
    }
    if (const auto* stem = std::get_if<StemArgs>(&step.layer))
        return aligned(stem_layout(*stem).total);
    if (const auto* pointwise = std::get_if<PointwiseArgs>(&step.layer))
        return aligned(pointwise_layout(*pointwise).total);
    return 0;
}

// A band of output rows of the last of a few steps. The rows of the others pass from step to step
// through line buffers.
class RowStream {
 public:
    // x: all rows of the first step's input. y may be x where there is one step only; kept: of a
    // last step with a gate.
    RowStream(const Kernel& kernel, const Step* steps, int64_t count, const InputRows& x, void* y,
              float* kept, int64_t row_begin, int64_t row_end, float* lines)
        : layers_(kernel.of(element_of(*steps))), x_(x.begin) {
        int64_t begin = row_begin, end = row_end;
        stages_.resize(count);
        for (int64_t i = count - 1; i >= 0; i--) {
            Stage& stage = stages_[i];
            stage.step = &steps[i];
            stage.next_row = begin, stage.row_end = end;
            stage.y = {y, rows_of(steps[i]), row_bytes(steps[i])};
            if (i < count - 1) {
                stage.y.slots = line_slots(steps[i], *block_of(steps[i + 1]));
                stage.y.begin = lines;
                lines += aligned_floats(stage.y.slots * stage.y.size);
            }
            stage.scratch = lines;
            lines += scratch_floats(steps[i], kernel.lanes);
            if (const auto* block = block_of(steps[i])) {
                const int64_t first = first_input_row(block->args, begin);
                end = std::min(first + window_rows(block->args, end - begin), block->args.H);
                begin = std::max<int64_t>(first, 0);
            }
        }
        for (int64_t i = 0; i < count; i++) {
            const auto* block = block_of(steps[i]);
            if (!block) continue;
            const BlockArgs& args = block->args;
            Stage& stage = stages_[i];
            Tile& tile = stage.tile;
            if (args.gate.width > 0) tile = tile_to_keep(*block, kernel.lanes, kept);
            tile.x = x, tile.y = stage.y;
            tile.row_begin = stage.next_row, tile.row_end = stage.row_end;
            tile.col_end = args.W_out, tile.hidden_end = args.hidden_channels;
            tile.adds_bias = tile.finishes = true;
            if (i > 0) {
                const OutputRows& rows = stages_[i - 1].y;
                tile.x = {rows.begin, rows.slots, rows.size};
            } else if (x.begin == y && args.element == Element::single) {
                tile.sums = stage.scratch + block_floats(*block, kernel.lanes);
            }
            layers_.begin_tile(args, block->schedule, tile, stage.scratch);
        }
    }

    void run() { make_rows(stages_.size() - 1, stages_.back().row_end); }

 private:
    struct Stage {
        const Step* step;
        int64_t next_row, row_end;
        OutputRows y;
        float* scratch;
        Tile tile;
    };

    void make_rows(int64_t i, int64_t end) {
        Stage& stage = stages_[i];
        while (stage.next_row < end) {
            const int64_t row = stage.next_row;
            const int64_t next = std::min(row + rows_per_step(*stage.step), stage.row_end);
            if (const auto* block = block_of(*stage.step)) {
                const int64_t input_end =
                    first_input_row(block->args, row) + window_rows(block->args, next - row);
                if (i > 0) make_rows(i - 1, std::min(input_end, stages_[i - 1].row_end));
                const bool keeps = block->args.gate.width > 0;
                const StepFn run = keeps ? layers_.keep_step : layers_.step_tile;
                run(block->args, block->schedule, stage.tile, stage.scratch, row);
            } else {
                layers_.stem_rows(std::get<StemArgs>(stage.step->layer), x_, stage.y, row, next,
                                  stage.scratch);
            }
            stage.next_row = next;
        }
    }

    const Layers& layers_;
    const void* x_;
    std::vector<Stage> stages_;
};

// Rows of x that a band reads on one side beyond its own.
int64_t reach_of(const Step& step) {
    const auto* block = block_of(step);
    return block ? extent(block->args) : 0;
}

struct NetworkRun {
    const Kernel& kernel;
    Scratch lines;
    const Threads& threads;

    // Steps that go row by row, each streaming into the next; the last one may have a gate. Where y
    // is x, the rows that bands read beyond their own are copied before any band writes: 2 * reach
    // rows for each border between bands, first those above it. The copies follow the threads'
    // lines.
    void stream(const Step* steps, int64_t count, const void* x, void* y, float* kept) const {
        const Step& last = steps[count - 1];
        const int64_t rows = rows_of(last);
        const int64_t steps_of_last = ceil_div(rows, rows_per_step(last));
        const int64_t bands = std::min(threads.count, steps_of_last);
        const auto* const gated = has_gate(last) ? block_of(last) : nullptr;
        const auto first_row = [&](int64_t band) {
            // The sums for a gate are those of whole steps.
            if (gated) return std::min(band * steps_of_last / bands * rows_per_step(last), rows);
            return band * rows / bands;
        };
        const auto* block = block_of(steps[0]);
        InputRows input{x, rows_of(steps[0]), row_bytes(steps[0])};
        if (block) input = {x, block->args.H, x_row_bytes(block->args)};
        const int64_t reach = reach_of(steps[0]);
        const int64_t size = reach * input.size;
        const auto* const x_rows = static_cast<const char*>(x);
        auto* const copies = reinterpret_cast<char*>(lines.of(threads.count));
        const bool in_place = x == y;
        if (in_place)
            for (int64_t band = 1; band < bands; band++)
                for (int64_t side = 0; side < 2; side++) {
                    const int64_t row = first_row(band) - (side == 0 ? reach : 0);
                    const int64_t from = std::max<int64_t>(row, 0);
                    const int64_t to = std::min(row + reach, rows);
                    char* const copy = copies + ((band - 1) * 2 + side) * size;
                    if (from < to)
                        std::copy(x_rows + from * input.size, x_rows + to * input.size,
                                  copy + (from - row) * input.size);
                }
        threads.run(bands, [&](int64_t band, int64_t thread) {
            InputRows own = input;
            const int64_t begin = first_row(band), end = first_row(band + 1);
            if (in_place) {
                if (band > 0) own.own_begin = begin;
                if (band + 1 < bands) own.own_end = end;
                own.before = copies + (band - 1) * 2 * size - (begin - reach) * input.size;
                own.after = copies + (band * 2 + 1) * size - end * input.size;
            }
            RowStream(kernel, steps, count, own, y, kept, begin, end, lines.of(thread)).run();
        });
        if (gated) cpu::finish_gated(kernel, *gated, y, lines, kept, threads);
    }

    // Calls run(begin, end, thread) for parts of `channels` in whole panels.
    template <class Function>
    void for_panels(int64_t channels, const Function& run) const {
        const int64_t panels = ceil_div(channels, kPanelChannels);
        const int64_t parts = std::min(threads.count, panels);
        threads.run(parts, [&](int64_t part, int64_t thread) {
            const int64_t begin = part * panels / parts * kPanelChannels;
            const int64_t end = (part + 1) * panels / parts * kPanelChannels;
            run(begin, std::min(end, channels), thread);
        });
    }

    void pointwise(const PointwiseArgs& args, const void* x, void* y) const {
        for_panels(args.out_channels, [&](int64_t begin, int64_t end, int64_t thread) {
            kernel.of(args.element).pointwise(args, x, y, begin, end, lines.of(thread));
        });
    }

    void average(const AverageArgs& args, const void* x, void* y) const {
        for_panels(args.channels, [&](int64_t begin, int64_t end, int64_t) {
            kernel.of(args.element).average(args, x, y, begin, end);
        });
    }

    void linear(const LinearArgs& args, int64_t images, const void* x, void* y) const {
        const int64_t parts = std::min(threads.count, args.out_features);
        threads.run(parts, [&](int64_t part, int64_t) {
            kernel.of(args.element)
                .linear_rows(args, images, x, y, part * args.out_features / parts,
                             (part + 1) * args.out_features / parts);
        });
    }
};

// The first `count` steps.
void run_steps(const NetworkRun& run, const std::vector<Step>& steps, size_t count, const void* x,
               void* y, void* arena) {
    const void* input = x;
    for (size_t first = 0, last; first < count; first = last + 1) {
        last = first;
        while (steps[last].streams) last++;
        const Step& step = steps[first];
        const int64_t offset = size_of(element_of(step)) * steps[last].output;
        void* const output = last + 1 == count ? y : static_cast<char*>(arena) + offset;
        float* const kept = reinterpret_cast<float*>(static_cast<char*>(arena) +
                                                     size_of(element_of(step)) * steps[last].kept);
        if (is_row_by_row(step))
            run.stream(&step, last - first + 1, input, output, kept);
        else if (const auto* block = block_of(step))
            run_block(run.kernel, *block, input, output, run.lines, kept, run.threads);
        else if (const auto* pointwise = std::get_if<PointwiseArgs>(&step.layer))
            run.pointwise(*pointwise, input, output);
        else if (const auto* average = std::get_if<AverageArgs>(&step.layer))
            run.average(*average, input, output);
        else
            run.linear(std::get<LinearArgs>(step.layer), 1, input, output);
        input = output;
    }
}

// The first of the fully connected layers that the network ends with; its size where there is none.
size_t first_of_tail(const std::vector<Step>& steps) {
    size_t first = steps.size();
    while (first > 0 && std::holds_alternative<LinearArgs>(steps[first - 1].layer)) first--;
    return first;
}
int64_t widest_of_tail(const std::vector<Step>& steps) {
    int64_t widest = 0;
    for (size_t i = first_of_tail(steps); i < steps.size(); i++)
        widest = std::max(widest, std::get<LinearArgs>(steps[i].layer).in_features);
    return widest;
}

// Floats of line buffers and scratch of one thread.
int64_t lines_of_thread(const std::vector<Step>& steps, int64_t lanes) {
    int64_t most = 0, streamed = 0;
    for (size_t i = 0; i < steps.size(); i++) {
        streamed += scratch_floats(steps[i], lanes);
        if (steps[i].streams)
            streamed +=
                aligned_floats(line_slots(steps[i], *block_of(steps[i + 1])) * row_bytes(steps[i]));
        else
            most = std::max(most, streamed), streamed = 0;
    }
    return most;
}

// Floats of copied border rows for each band after the first.
int64_t copies_of_band(const std::vector<Step>& steps) {
    int64_t most = 0;
    for (const Step& step : steps)
        if (is_row_by_row(step)) most = std::max(most, 2 * reach_of(step) * row_bytes(step));
    return aligned_floats(most);
}

NetworkRun network_run(const Kernel& kernel, const std::vector<Step>& steps, float* lines,
                       const Threads& threads) {
    return {kernel, {lines, lines_of_thread(steps, kernel.lanes)}, threads};
}

}  // namespace

bool is_row_by_row(const Step& step) {
    if (const auto* block = block_of(step))
        return block->schedule.rows_outside && block->schedule.strip_cols == block->args.W_out;
    return std::holds_alternative<StemArgs>(step.layer);
}

bool takes_rows(const Step& step) {
    const auto* block = block_of(step);
    if (!has_gate(step)) return is_row_by_row(step);
    return keeps_row_by_row(block->args, block->schedule) && !block->args.residual;
}

int64_t kept_elements(const Step& step, int64_t lanes) {
    const auto* block = block_of(step);
    return block ? kept_floats(*block, lanes, 1) * 4 / size_of(element_of(step)) : 0;
}

int64_t line_floats(const std::vector<Step>& steps, int64_t lanes, int64_t threads) {
    return threads * lines_of_thread(steps, lanes) + (threads - 1) * copies_of_band(steps);
}

int64_t rows_in_memory(const std::vector<Step>& steps, size_t number) {
    const Step& step = steps[number];
    if (step.streams) return line_slots(step, *block_of(steps[number + 1]));
    if (const auto* pointwise = std::get_if<PointwiseArgs>(&step.layer))
        return pointwise->averages ? 1 : pointwise->H;
    const bool has_rows = block_of(step) || std::holds_alternative<StemArgs>(step.layer);
    return has_rows ? rows_of(step) : 1;
}

void run_network(const Kernel& kernel, const std::vector<Step>& steps, const void* x, void* y,
                 void* arena, float* lines, const Threads& threads) {
    run_steps(network_run(kernel, steps, lines, threads), steps, steps.size(), x, y, arena);
}

int64_t classified_features(const std::vector<Step>& steps) {
    const size_t first = first_of_tail(steps);
    if (first == 0 || first == steps.size()) return 0;
    // A layer's input and its result, which the next one reads.
    return (first + 1 < steps.size() ? 2 : 1) * widest_of_tail(steps);
}

void run_images(const Kernel& kernel, const std::vector<Step>& steps, int64_t images, const void* x,
                int64_t x_size, void* y, void* features, void* arena, float* lines,
                const Threads& threads) {
    const NetworkRun run = network_run(kernel, steps, lines, threads);
    const size_t first = first_of_tail(steps);
    const auto linear = [&](size_t i) { return std::get<LinearArgs>(steps[i].layer); };
    const int64_t element = size_of(linear(first).element);
    auto* input = static_cast<char*>(features);
    auto* result = input + images * element * widest_of_tail(steps);
    for (int64_t i = 0; i < images; i++)
        run_steps(run, steps, first, static_cast<const char*>(x) + i * x_size,
                  input + i * element * linear(first).in_features, arena);
    for (size_t i = first; i + 1 < steps.size(); i++) {
        run.linear(linear(i), images, input, result);
        std::swap(input, result);
    }
    run.linear(linear(steps.size() - 1), images, input, y);
}

}  // namespace mnv2::cpu
