#include "run_block.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "sizes.h"

namespace mnv2::cpu {

namespace {

// Output rows [row_begin, row_end) of one hidden group of an image.
struct Part {
    int64_t image, group;
    int64_t row_begin, row_end;
};

struct BlockRun {
    const Kernel& kernel;
    const BlockArgs& args;
    const Schedule& schedule;
    const char* x;
    char* y;
    const Scratch& scratch;
    float* kept;
    const Threads& threads;

    const Layers& layers() const { return kernel.of(args.element); }
    const void* x_of(int64_t image) const { return x + image * args.H * x_row_bytes(args); }
    void* y_of(int64_t image) const { return y + image * args.H_out * y_row_bytes(args); }

    // All rows, columns and hidden channels of an image.
    Tile whole_image(int64_t image) const {
        Tile tile{};
        tile.x = {x_of(image), args.H, x_row_bytes(args)};
        tile.y = {y_of(image), args.H_out, y_row_bytes(args)};
        tile.row_end = args.H_out, tile.col_end = args.W_out;
        tile.hidden_end = args.hidden_channels;
        tile.adds_bias = tile.finishes = true;
        return tile;
    }

    // `result` is laid out as one image of y, of floats where there are two hidden groups.
    void run_part(const Part& part, void* result, float* own) const {
        Tile tile = whole_image(part.image);
        tile.finishes = schedule.hidden_groups == 1;
        tile.adds_bias = part.group == 0;
        tile.y = {result, args.H_out,
                  tile.finishes ? y_row_bytes(args) : 4 * args.W_out * args.out_channels};
        tile.row_begin = part.row_begin, tile.row_end = part.row_end;
        const auto hidden = hidden_range(args, schedule, kernel.lanes, part.group);
        tile.hidden_begin = hidden.first, tile.hidden_end = hidden.second;
        for (int64_t col = 0; col < args.W_out; col += schedule.strip_cols) {
            tile.col_begin = col;
            tile.col_end = std::min(col + schedule.strip_cols, args.W_out);
            layers().run_tile(args, schedule, tile, own);
        }
    }

    // Every image cut into bands of rows, as many as give all threads the same number of bands.
    void run_bands() const {
        const int64_t steps = ceil_div(args.H_out, schedule.rows_per_step);
        const int64_t bands = std::min(threads.count / std::gcd(threads.count, args.N), steps);
        threads.run(args.N * bands, [&](int64_t number, int64_t thread) {
            const int64_t image = number / bands, band = number % bands;
            const Part part{image, 0, band * args.H_out / bands, (band + 1) * args.H_out / bands};
            run_part(part, y_of(image), scratch.of(thread));
        });
    }

    // The sums of two hidden groups. Those of the first are in y where y is float32.
    struct Sums {
        float *first, *second;
    };
    Sums sums_of(int64_t image, float* own) const {
        float* const second = own + scratch_layout(args, schedule, kernel.lanes).partial;
        if (args.element == Element::single) return {static_cast<float*>(y_of(image)), second};
        return {second + y_numbers(args), second};
    }

    // One thread computes both groups of an image while there are images for most threads. Two
    // threads share each of the few images that are left. The sums and their order are the same.
    void run_two_groups() const {
        const auto run_group = [&](int64_t image, int64_t group, const Sums& sums, float* own) {
            run_part({image, group, 0, args.H_out}, group == 0 ? sums.first : sums.second, own);
        };
        const auto combine = [&](int64_t image, const Sums& sums) {
            layers().combine(args, x_of(image), sums.first, sums.second, y_of(image));
        };
        const int64_t left_over = args.N % threads.count;
        const int64_t shared = 2 * left_over <= threads.count ? left_over : 0;
        const int64_t whole = args.N - shared;
        threads.run(whole, [&](int64_t image, int64_t thread) {
            float* const own = scratch.of(thread);
            const Sums sums = sums_of(image, own);
            run_group(image, 0, sums, own);
            run_group(image, 1, sums, own);
            combine(image, sums);
        });
        for (int64_t image = whole; image < args.N; image++) {
            const Sums sums = sums_of(image, scratch.begin);
            threads.run(2, [&](int64_t group, int64_t thread) {
                run_group(image, group, sums, scratch.of(thread));
            });
            combine(image, sums);
        }
    }

    // With a gate: one image by one thread while there are enough for all threads, then the rest
    // one after the other.
    void run_gated() const {
        const GateLayout layout = gate_layout(args, schedule, kernel.lanes);
        const int64_t whole = args.N < threads.count ? 0 : args.N - args.N % threads.count;
        const Threads alone{1, [](int64_t tasks, const Threads::Task& task) {
                                for (int64_t i = 0; i < tasks; i++) task(i, 0);
                            }};
        threads.run(whole, [&](int64_t image, int64_t thread) {
            gated_image(image, layout, kept + thread * layout.total, scratch.of(thread), alone);
        });
        for (int64_t image = whole; image < args.N; image++)
            gated_image(image, layout, kept, scratch.begin, threads);
    }

    // own: the scratch of each of these threads, one after the other.
    void gated_image(int64_t image, const GateLayout& layout, float* kept_of_image, float* own,
                     const Threads& these) const {
        const Tile tile = with_kept(whole_image(image), layout, kept_of_image);
        const int64_t steps = ceil_div(args.H_out, schedule.rows_per_step);
        const int64_t chunks = ceil_div(args.hidden_channels, schedule.hidden_chunk);
        const int64_t bands = std::min(ceil_div(these.count, chunks), steps);
        const auto keep = [&](int64_t number, int64_t thread) {
            const int64_t chunk = number / bands, band = number % bands;
            Tile part = tile;
            part.hidden_begin = chunk * schedule.hidden_chunk;
            part.hidden_end =
                std::min(part.hidden_begin + schedule.hidden_chunk, args.hidden_channels);
            part.row_begin = band * steps / bands * schedule.rows_per_step;
            part.row_end =
                std::min((band + 1) * steps / bands * schedule.rows_per_step, args.H_out);
            float* const mine = own + thread * scratch.floats;
            layers().begin_tile(args, schedule, part, mine);
            for (int64_t row = part.row_begin; row < part.row_end; row += schedule.rows_per_step)
                layers().keep_step(args, schedule, part, mine, row);
        };
        const int64_t units = chunks * bands, tasks = std::min(these.count, units);
        these.run(tasks, [&](int64_t task, int64_t thread) {
            for (int64_t i = task * units / tasks; i < (task + 1) * units / tasks; i++)
                keep(i, thread);
        });
        finish_gated(tile, layout, own, these);
    }

    static Tile with_kept(Tile tile, const GateLayout& layout, float* kept_of_image) {
        tile.kept = kept_of_image;
        tile.step_sums = kept_of_image + layout.sums;
        tile.gate = kept_of_image + layout.gate;
        return tile;
    }

    // The gate and the second part, of a whole image whose first part is done.
    void finish_gated(const Tile& tile, const GateLayout& layout, float* own,
                      const Threads& these) const {
        run_gate(layout, tile.kept, these);
        const int64_t parts = std::min(these.count, args.H_out);
        const bool sums = args.element == Element::single && args.residual;
        these.run(parts, [&](int64_t number, int64_t thread) {
            Tile part = tile;
            part.row_begin = number * args.H_out / parts;
            part.row_end = (number + 1) * args.H_out / parts;
            float* const mine = own + thread * scratch.floats;
            if (sums) part.sums = mine + scratch_layout(args, schedule, kernel.lanes).sums;
            layers().project_kept(args, schedule, part, mine);
        });
    }

    // The gate from the sums. Small ones are not worth waking threads for.
    void run_gate(const GateLayout& layout, float* kept_of_image, const Threads& these) const {
        constexpr int64_t kOfOneThread = 32 * 1024;  // weights of a layer
        constexpr int64_t kUnits = 64;
        float* const means = kept_of_image + layout.means;
        float* const squeezed = kept_of_image + layout.squeezed;
        float* const gate = kept_of_image + layout.gate;
        const int64_t steps = ceil_div(args.H_out, schedule.rows_per_step);
        layers().means(args, kept_of_image + layout.sums, steps, means);
        const bool together = args.hidden_channels * args.gate.width > kOfOneThread;
        const auto in_panels = [&](int64_t units, const auto& run) {
            const int64_t panels = ceil_div(units, kUnits);
            const int64_t parts = together ? std::min(these.count, panels) : 1;
            const auto unit = [&](int64_t part) {
                return std::min(part * panels / parts * kUnits, units);
            };
            if (parts == 1) return run(0, units);
            these.run(parts, [&](int64_t part, int64_t) { run(unit(part), unit(part + 1)); });
        };
        in_panels(args.gate.width, [&](int64_t begin, int64_t end) {
            layers().squeeze(args, means, squeezed, begin, end);
        });
        in_panels(args.hidden_channels, [&](int64_t begin, int64_t end) {
            layers().excite(args, squeezed, gate, begin, end);
        });
    }
};

}  // namespace

int64_t kept_floats(const BlockStep& block, int64_t lanes, int64_t threads) {
    const int64_t at_a_time = block.args.N < threads ? 1 : threads;
    return at_a_time * gate_layout(block.args, block.schedule, lanes).total;
}

Tile tile_to_keep(const BlockStep& block, int64_t lanes, float* kept) {
    return BlockRun::with_kept({}, gate_layout(block.args, block.schedule, lanes), kept);
}

static BlockRun block_run(const Kernel& kernel, const BlockStep& block, const void* x, void* y,
                          const Scratch& scratch, float* kept, const Threads& threads) {
    return {kernel,  block.args, block.schedule, static_cast<const char*>(x), static_cast<char*>(y),
            scratch, kept,       threads};
}

void finish_gated(const Kernel& kernel, const BlockStep& block, void* y, const Scratch& scratch,
                  float* kept, const Threads& threads) {
    const BlockRun run = block_run(kernel, block, nullptr, y, scratch, kept, threads);
    const GateLayout layout = gate_layout(block.args, block.schedule, kernel.lanes);
    run.finish_gated(BlockRun::with_kept(run.whole_image(0), layout, kept), layout, scratch.begin,
                     threads);
}

void run_block(const Kernel& kernel, const BlockStep& block, const void* x, void* y,
               const Scratch& scratch, float* kept, const Threads& threads) {
    const BlockRun run = block_run(kernel, block, x, y, scratch, kept, threads);
    if (block.args.gate.width > 0)
        run.run_gated();
    else if (block.schedule.hidden_groups == 1)
        run.run_bands();
    else
        run.run_two_groups();
}

}  // namespace mnv2::cpu
