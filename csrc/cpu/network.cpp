#include "network.h"

#include <algorithm>

namespace mnv2::cpu {

namespace {

constexpr int64_t kAlignFloats = 16;
int64_t aligned(int64_t floats) {
    return (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
}
int64_t aligned_bytes(int64_t bytes) { return aligned((bytes + 3) / 4); }  // as floats

const BlockStep* block_of(const Step& step) { return std::get_if<BlockStep>(&step.layer); }

int64_t rows_of(const Step& step) {
    if (const auto* block = block_of(step)) return block->args.H_out;
    return std::get<StemArgs>(step.layer).H_out;
}
Element element_of(const Step& step) {
    if (const auto* block = block_of(step)) return block->args.element;
    if (const auto* stem = std::get_if<StemArgs>(&step.layer)) return stem->element;
    if (const auto* pool = std::get_if<PoolArgs>(&step.layer)) return pool->element;
    return std::get<LinearArgs>(step.layer).element;
}
// Bytes of a row of the result, and of x.
int64_t row_size(const Step& step) {
    const int64_t size = size_of(element_of(step));
    if (const auto* block = block_of(step))
        return size * block->args.W_out * block->args.out_channels;
    const auto& stem = std::get<StemArgs>(step.layer);
    return size * stem.W_out * stem.out_channels;
}
int64_t row_size_of_x(const BlockArgs& args) {
    return size_of(args.element) * args.W * args.in_channels;
}
int64_t rows_per_step(const Step& step) {
    const auto* block = block_of(step);
    return block ? block->schedule.rows_per_step : 1;
}
// Input rows that `count` output rows read, the first of them, and one past the last.
int64_t window(const Step& step, int64_t count) {
    if (const auto* block = block_of(step)) return ring_of(block->args, count).window;
    return 2 * count + 1;
}
int64_t first_input_row(const Step& step, int64_t row) {
    const BlockArgs& args = block_of(step)->args;
    return row * args.stride - args.pad_top;
}

// Rows of a streamed tensor in memory: those that the next step reads at once, and those that come
// too many because they are made a few at a time.
int64_t line_slots(const Step& step, const Step& next) {
    const int64_t most = window(next, rows_per_step(next)) + rows_per_step(step) - 1;
    return std::min(most, rows_of(step));
}

int64_t scratch_floats(const Step& step, int64_t lanes) {
    if (const auto* block = block_of(step)) {
        const BlockArgs& args = block->args;
        const int64_t sums = args.element == Element::single
                                 ? block->schedule.rows_per_step * args.W_out * args.out_channels
                                 : 0;
        return aligned(scratch_layout(args, block->schedule, lanes).total) + aligned(sums);
    }
    if (const auto* stem = std::get_if<StemArgs>(&step.layer))
        return aligned(stem_layout(*stem).total);
    if (const auto* pool = std::get_if<PoolArgs>(&step.layer))
        return aligned(pool_layout(*pool).total);
    return 0;
}

// One band of output rows of the last of a few steps, whose tensors in between pass through lines
// of a few rows.
class Chain {
 public:
    // x: the input of the first step, all of its rows; y may be x where there is one step only.
    Chain(const Kernel& kernel, const Step* steps, int64_t count, const InputRows& x, void* y,
          int64_t row_begin, int64_t row_end, float* lines)
        : layers_(kernel.of(element_of(*steps))), x_(x.begin) {
        int64_t begin = row_begin, end = row_end;
        links_.resize(count);
        for (int64_t i = count - 1; i >= 0; i--) {
            Link& link = links_[i];
            link.step = &steps[i];
            link.next_row = begin, link.row_end = end;
            link.y = {y, rows_of(steps[i]), row_size(steps[i])};
            if (i < count - 1) {
                link.y.slots = line_slots(steps[i], steps[i + 1]);
                link.y.begin = lines;
                lines += aligned_bytes(link.y.slots * link.y.size);
            }
            link.scratch = lines;
            lines += scratch_floats(steps[i], kernel.lanes);
            if (const auto* block = block_of(steps[i])) {
                const int64_t first = first_input_row(steps[i], begin);
                end = std::min(first + window(steps[i], end - begin), block->args.H);
                begin = std::max<int64_t>(first, 0);
            }
        }
        for (int64_t i = 0; i < count; i++)
            if (const auto* block = block_of(steps[i])) {
                const BlockArgs& args = block->args;
                Link& link = links_[i];
                link.tile = {x,          link.y, link.next_row,        link.row_end, 0,
                             args.W_out, 0,      args.hidden_channels, nullptr,      true,
                             true};
                if (i > 0) {
                    const OutputRows& rows = links_[i - 1].y;
                    link.tile.x = {rows.begin, rows.slots, rows.size};
                } else if (x.begin == y && args.element == Element::single) {
                    const int64_t floats =
                        aligned(scratch_layout(args, block->schedule, kernel.lanes).total);
                    link.tile.sums = link.scratch + floats;
                }
                layers_.begin_tile(args, block->schedule, link.tile, link.scratch);
            }
    }

    void run() { make_rows(links_.size() - 1, links_.back().row_end); }

 private:
    struct Link {
        const Step* step;
        int64_t next_row, row_end;
        OutputRows y;
        float* scratch;
        Tile tile;
    };

    void make_rows(int64_t i, int64_t end) {
        Link& link = links_[i];
        while (link.next_row < end) {
            const int64_t row = link.next_row;
            const int64_t next = std::min(row + rows_per_step(*link.step), link.row_end);
            if (const auto* block = block_of(*link.step)) {
                const int64_t input_end =
                    first_input_row(*link.step, row) + window(*link.step, next - row);
                if (i > 0) make_rows(i - 1, std::min(input_end, links_[i - 1].row_end));
                layers_.step_tile(block->args, block->schedule, link.tile, link.scratch, row);
            } else {
                layers_.stem_rows(std::get<StemArgs>(link.step->layer), x_, link.y, row, next,
                                  link.scratch);
            }
            link.next_row = next;
        }
    }

    const Layers& layers_;
    const void* x_;
    std::vector<Link> links_;
};

// Rows of x that a band reads on one side beyond its own.
int64_t reach_of(const Step& step) {
    const auto* block = block_of(step);
    return block ? (block->args.kernel - 1) * block->args.dilation : 0;
}

struct Run {
    const Kernel& kernel;
    float* lines;
    int64_t lines_size;  // of one thread
    const Threads& threads;

    float* lines_of(int64_t thread) const { return lines + thread * lines_size; }

    // All columns of a tile, as many at a time as the schedule has room for.
    void run_strips(const BlockStep& block, Tile tile, int64_t thread) const {
        const BlockArgs& args = block.args;
        for (int64_t col = 0; col < args.W_out; col += block.schedule.strip_cols) {
            tile.col_begin = col;
            tile.col_end = std::min(col + block.schedule.strip_cols, args.W_out);
            kernel.of(args.element).run_tile(args, block.schedule, tile, lines_of(thread));
        }
    }

    void block_in_groups(const BlockStep& block, const void* x, void* y) const {
        const BlockArgs& args = block.args;
        const ScratchLayout layout = scratch_layout(args, block.schedule, kernel.lanes);
        const Layers& layers = kernel.of(args.element);
        float* const second = lines + layout.partial;
        float* const first =
            args.element == Element::single ? static_cast<float*>(y) : second + sum_floats(args);
        const auto group_of = [&](int64_t group, int64_t thread) {
            const auto [hidden_begin, hidden_end] =
                hidden_range(args, block.schedule, kernel.lanes, group);
            const Tile tile{
                {x, args.H, row_size_of_x(args)},
                {group == 0 ? first : second, args.H_out, 4 * args.W_out * args.out_channels},
                0,
                args.H_out,
                0,
                0,
                hidden_begin,
                hidden_end,
                nullptr,
                group == 0,
                false};
            run_strips(block, tile, thread);
        };
        threads.run(2, group_of);
        layers.combine(args, x, first, second, y);
    }

    // Rows of x that bands read beyond their own, copied before any band writes: 2 * reach rows for
    // each border between bands, those above it first.
    void chain(const Step* steps, int64_t count, const void* x, void* y) const {
        const Step& last = steps[count - 1];
        const int64_t rows = rows_of(last), per_step = rows_per_step(last);
        const int64_t bands = std::min(threads.count, (rows + per_step - 1) / per_step);
        const auto first_row = [&](int64_t band) { return band * rows / bands; };
        const auto* block = block_of(steps[0]);
        InputRows input{x, rows_of(steps[0]), row_size(steps[0])};
        if (block) input = {x, block->args.H, row_size_of_x(block->args)};
        const int64_t reach = reach_of(steps[0]);
        const int64_t size = reach * input.size;
        const auto* const x_rows = static_cast<const char*>(x);
        auto* const copies = reinterpret_cast<char*>(lines + threads.count * lines_size);
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
                own.behind = copies + (band * 2 + 1) * size - end * input.size;
            }
            Chain(kernel, steps, count, own, y, begin, end, lines_of(thread)).run();
        });
    }

    void block_in_chunks(const BlockStep& block, const void* x, void* y) const {
        const BlockArgs& args = block.args;
        const Schedule& schedule = block.schedule;
        const int64_t steps = (args.H_out + schedule.rows_per_step - 1) / schedule.rows_per_step;
        const int64_t bands = std::min(threads.count, steps);
        threads.run(bands, [&](int64_t band, int64_t thread) {
            const Tile tile{{x, args.H, row_size_of_x(args)},
                            {y, args.H_out, size_of(args.element) * args.W_out * args.out_channels},
                            band * args.H_out / bands,
                            (band + 1) * args.H_out / bands,
                            0,
                            0,
                            0,
                            args.hidden_channels,
                            nullptr,
                            true,
                            true};
            run_strips(block, tile, thread);
        });
    }

    void pool(const PoolArgs& args, const void* x, void* y) const {
        const int64_t panels = (args.out_channels + kPoolPanel - 1) / kPoolPanel;
        const int64_t parts = std::min(threads.count, panels);
        threads.run(parts, [&](int64_t part, int64_t thread) {
            const int64_t begin = part * panels / parts * kPoolPanel;
            const int64_t end =
                std::min((part + 1) * panels / parts * kPoolPanel, args.out_channels);
            kernel.of(args.element).pool_columns(args, x, y, begin, end, lines_of(thread));
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
void run_steps(const Run& run, const std::vector<Step>& steps, size_t count, const void* x, void* y,
               void* arena) {
    const void* input = x;
    for (size_t first = 0, last; first < count; first = last + 1) {
        last = first;
        while (steps[last].streams) last++;
        const Step& step = steps[first];
        const int64_t offset = size_of(element_of(step)) * steps[last].output;
        void* const output = last + 1 == count ? y : static_cast<char*>(arena) + offset;
        if (const auto* pool = std::get_if<PoolArgs>(&step.layer))
            run.pool(*pool, input, output);
        else if (const auto* linear = std::get_if<LinearArgs>(&step.layer))
            run.linear(*linear, 1, input, output);
        else if (is_row_by_row(step))
            run.chain(&step, last - first + 1, input, output);
        else if (block_of(step)->schedule.hidden_groups > 1)
            run.block_in_groups(*block_of(step), input, output);
        else
            run.block_in_chunks(*block_of(step), input, output);
        input = output;
    }
}

// Of a thread, and of the rows that are copied for every further band.
int64_t lines_of_thread(const std::vector<Step>& steps, int64_t lanes) {
    int64_t most = 0, chain = 0;
    for (size_t i = 0; i < steps.size(); i++) {
        chain += scratch_floats(steps[i], lanes);
        if (steps[i].streams)
            chain += aligned_bytes(line_slots(steps[i], steps[i + 1]) * row_size(steps[i]));
        else
            most = std::max(most, chain), chain = 0;
    }
    return most;
}
int64_t copies_of_band(const std::vector<Step>& steps) {
    int64_t most = 0;
    for (const Step& step : steps)
        if (is_row_by_row(step)) most = std::max(most, 2 * reach_of(step) * row_size(step));
    return aligned_bytes(most);
}

}  // namespace

bool is_row_by_row(const Step& step) {
    if (const auto* block = block_of(step))
        return block->schedule.rows_outside && block->schedule.strip_cols == block->args.W_out;
    return std::holds_alternative<StemArgs>(step.layer);
}

int64_t line_floats(const std::vector<Step>& steps, int64_t lanes, int64_t threads) {
    return threads * lines_of_thread(steps, lanes) + (threads - 1) * copies_of_band(steps);
}

int64_t rows_in_memory(const std::vector<Step>& steps, size_t number) {
    const Step& step = steps[number];
    if (step.streams) return line_slots(step, steps[number + 1]);
    if (const auto* pool = std::get_if<PoolArgs>(&step.layer)) return pool->averages ? 1 : pool->H;
    return std::holds_alternative<LinearArgs>(step.layer) ? 1 : rows_of(step);
}

void run_network(const Kernel& kernel, const std::vector<Step>& steps, const void* x, void* y,
                 void* arena, float* lines, const Threads& threads) {
    const Run run{kernel, lines, lines_of_thread(steps, kernel.lanes), threads};
    run_steps(run, steps, steps.size(), x, y, arena);
}

int64_t classified_features(const std::vector<Step>& steps) {
    const auto* const linear = std::get_if<LinearArgs>(&steps.back().layer);
    return linear && steps.size() > 1 ? linear->in_features : 0;
}

void run_images(const Kernel& kernel, const std::vector<Step>& steps, int64_t images, const void* x,
                int64_t x_size, void* y, void* features, void* arena, float* lines,
                const Threads& threads) {
    const Run run{kernel, lines, lines_of_thread(steps, kernel.lanes), threads};
    const auto& linear = std::get<LinearArgs>(steps.back().layer);
    const int64_t size = size_of(linear.element) * linear.in_features;
    for (int64_t i = 0; i < images; i++)
        run_steps(run, steps, steps.size() - 1, static_cast<const char*>(x) + i * x_size,
                  static_cast<char*>(features) + i * size, arena);
    run.linear(linear, images, features, y);
}

}  // namespace mnv2::cpu
