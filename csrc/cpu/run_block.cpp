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
    const Threads& threads;

    const Layers& layers() const { return kernel.of(args.element); }
    const void* x_of(int64_t image) const { return x + image * args.H * x_row_bytes(args); }
    void* y_of(int64_t image) const { return y + image * args.H_out * y_row_bytes(args); }

    // `result` is laid out as one image of y, of floats where there are two hidden groups.
    void run_part(const Part& part, void* result, float* own) const {
        Tile tile{};
        tile.finishes = schedule.hidden_groups == 1;
        tile.starts_with_bias = part.group == 0;
        tile.x = {x_of(part.image), args.H, x_row_bytes(args)};
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
};

}  // namespace

void run_block(const Kernel& kernel, const BlockStep& block, const void* x, void* y,
               const Scratch& scratch, const Threads& threads) {
    const BlockRun run{
        kernel,  block.args, block.schedule, static_cast<const char*>(x), static_cast<char*>(y),
        scratch, threads};
    block.schedule.hidden_groups == 1 ? run.run_bands() : run.run_two_groups();
}

}  // namespace mnv2::cpu
