#include "backward.h"

#include <algorithm>
#include <cstring>

namespace mnv2::cpu {

namespace {

// Expansion, depthwise output and their gradients of one band: they stay in L2.
constexpr int64_t kBandFloats = 96 * 1024;
constexpr int64_t kMostChannels = 64;
// The same of one chunk of a whole batch, which is worth more: nothing is computed twice.
constexpr int64_t kWholeBatchFloats = 512 * 1024;
// Of a chunk of a whole batch: narrower ones read x too often, and have more sums to add up.
constexpr int64_t kLeastChannels = 32;
// More tasks than most machines have cores would cost more memory than they save time.
constexpr int64_t kTasks = 8;

// Input rows that `rows` output rows read, and below the last row those that none reads.
int64_t input_rows(const BlockSizes& s, int64_t rows) {
    return std::min(window_rows(s, rows) - 1 + s.stride, s.H);
}

int64_t band_floats(const BlockSizes& s, int64_t chunk, int64_t rows) {
    return chunk * (2 * input_rows(s, rows) * s.W + (2 * rows + rows_kept(s)) * s.W_out);
}

}  // namespace

BackwardSchedule choose_backward_schedule(const BlockSizes& sizes, int64_t lanes) {
    BackwardSchedule schedule{};
    int64_t most = std::min(round_up(sizes.hidden_channels, lanes), kMostChannels);
    while (most > lanes && band_floats(sizes, most, 1) > kBandFloats)
        most = round_up(most / 2, lanes);
    const int64_t chunks = ceil_div(sizes.hidden_channels, most);
    schedule.chunk = round_up(ceil_div(sizes.hidden_channels, chunks), lanes);
    schedule.chunks = ceil_div(sizes.hidden_channels, schedule.chunk);
    schedule.groups = std::min(schedule.chunks, kTasks);
    schedule.rows = 1;
    while (schedule.rows < sizes.H_out &&
           band_floats(sizes, schedule.chunk, schedule.rows + 1) <= kBandFloats)
        schedule.rows++;
    const int64_t bands = ceil_div(sizes.H_out, schedule.rows);
    schedule.rows = ceil_div(sizes.H_out, bands);
    // The last band finishes all rows, so it may have more of them than the others.
    schedule.in_rows = bands == 1 ? sizes.H : input_rows(sizes, schedule.rows);
    schedule.grad_rows = schedule.rows + rows_kept(sizes);
    const int64_t fit = kBandFloats / band_floats(sizes, schedule.chunk, schedule.rows);
    schedule.images = bands > 1 ? 1 : std::clamp<int64_t>(fit, 1, std::max<int64_t>(sizes.N, 1));
    return schedule;
}

BackwardSchedule choose_training_schedule(const BlockSizes& sizes, int64_t lanes) {
    const int64_t pixels = sizes.N * (3 * sizes.H * sizes.W + 2 * sizes.H_out * sizes.W_out);
    const int64_t fit = kWholeBatchFloats / pixels / lanes * lanes;
    if (fit < std::min(kLeastChannels, round_up(sizes.hidden_channels, lanes)))
        return choose_backward_schedule(sizes, lanes);
    BackwardSchedule schedule{};
    const int64_t most = std::min({round_up(sizes.hidden_channels, lanes), kMostChannels, fit});
    const int64_t chunks = ceil_div(sizes.hidden_channels, most);
    schedule.chunk = round_up(ceil_div(sizes.hidden_channels, chunks), lanes);
    schedule.chunks = ceil_div(sizes.hidden_channels, schedule.chunk);
    schedule.groups = std::min(schedule.chunks, kTasks);
    schedule.rows = sizes.H_out, schedule.in_rows = sizes.H;
    schedule.grad_rows = schedule.rows + rows_kept(sizes);
    schedule.images = sizes.N, schedule.whole_batch = true;
    return schedule;
}

int64_t backward_scratch(const BlockSizes& sizes, const BackwardSchedule& schedule,
                         bool of_convolutions) {
    const int64_t copies = of_convolutions ? 2 : 1;
    const int64_t weights = 2 * sizes.kernel_size * sizes.kernel_size + 10 +
                            copies * (sizes.in_channels * sizes.expansion + sizes.out_channels);
    const int64_t of_expansion = schedule.whole_batch ? 3 : 2;
    const int64_t pixels =
        of_expansion * schedule.in_rows * sizes.W + 2 * schedule.rows * sizes.W_out;
    return schedule.chunk * (schedule.images * pixels + rows_kept(sizes) * sizes.W_out + weights);
}

BackwardSplit choose_backward_split(const BlockSizes& sizes, const BackwardSchedule& schedule) {
    if (schedule.whole_batch) return {1, schedule.groups};
    const int64_t x = sizes.N * sizes.H * sizes.W * sizes.in_channels;
    const int64_t weights =
        sizes.hidden_channels * (sizes.in_channels * sizes.expansion +
                                 sizes.kernel_size * sizes.kernel_size + sizes.out_channels + 2);
    BackwardSplit best{1, 1};
    int64_t best_floats = 0;
    for (const int64_t hidden : {int64_t{1}, schedule.groups}) {
        const int64_t images =
            std::clamp<int64_t>(kTasks / hidden, 1, std::max<int64_t>(sizes.N, 1));
        const int64_t floats = (images - 1) * weights + (hidden - 1) * x;
        const int64_t tasks = images * hidden, best_tasks = best.images * best.hidden;
        if (tasks > best_tasks || (tasks == best_tasks && floats < best_floats))
            best = {images, hidden}, best_floats = floats;
    }
    return best;
}

BackwardSplit choose_moments_split(const BlockSizes& sizes, const BackwardSchedule& schedule) {
    const int64_t images = schedule.whole_batch ? 1 : ceil_div(kTasks, schedule.groups);
    return {std::clamp<int64_t>(images, 1, std::max<int64_t>(sizes.N, 1)), schedule.groups};
}

void merge_moments(Moments more, int64_t channels, double count, double before, Moments moments) {
    for (int64_t i = 0; i < channels; i++) {
        double &mean = moments.mean[i], &squares = moments.squares[i];
        if (before == 0) mean = more.mean[i], squares = 0;
        const double apart = more.mean[i] - mean;
        mean += apart * count / (before + count);
        squares += more.squares[i] + apart * apart * before * count / (before + count);
    }
}

const BackwardKernel& select_backward_kernel(const char* name) {
#if defined(__x86_64__)
    for (const BackwardKernel* kernel : {&kAvx512Backward, &kAvx2Backward})
        if (std::strcmp(kernel->name, name) == 0) return *kernel;
#endif
    (void)name;
    return kGenericBackward;
}

}  // namespace mnv2::cpu
