// The op on CPU tensors: one image and band of rows (or group of hidden channels) a task.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "../cpu/kernels.h"
#include "host.h"

namespace mnv2::cpu {

namespace {

// The instruction set is torch's own choice, so ATEN_CPU_CAPABILITY steers both.
const Kernel& kernel() {
    static const Kernel& selected = select_kernel(at::get_cpu_capability().c_str());
    return selected;
}

// MNV2_PRINT_CONFIGS=1: the schedule of every new shape, once, on stderr.
void print_once(const BlockArgs& args, const Schedule& schedule) {
    static const char* variable = std::getenv("MNV2_PRINT_CONFIGS");
    static const bool enabled = variable != nullptr && variable[0] == '1';
    if (!enabled) return;
    static std::mutex mutex;
    static std::set<std::string> printed;
    const std::string line = to_string(args, schedule, kernel().lanes);
    const std::lock_guard<std::mutex> lock(mutex);
    if (printed.insert(line).second)
        std::fprintf(stderr, "mnv2 %s %s\n", kernel().name, line.c_str());
}

// One call: how its images, bands of rows and hidden groups are shared among the threads.
struct Job {
    const BlockArgs& args;
    const Schedule& schedule;
    const Layers& layers;
    const char* x;
    char* y;
    ScratchLayout layout;
    float* scratch;  // layout.total floats a thread

    float* scratch_of(int64_t thread) const { return scratch + thread * layout.total; }

    const void* x_of(int64_t image) const {
        return x + image * args.H * args.W * args.in_channels * size_of(args.element);
    }

    void* y_of(int64_t image) const { return y + image * sum_floats(args) * size_of(args.element); }

    // One hidden group of rows [row_begin, row_end); `result` has the layout of one image of y, and
    // is of floats where there is another group.
    void run_rows(int64_t image, int64_t group, int64_t row_begin, int64_t row_end, void* result,
                  float* thread_scratch) const {
        Tile tile{};
        const int64_t size = size_of(args.element);
        tile.finishes = schedule.hidden_groups == 1;
        tile.x = {x_of(image), args.H, args.W * args.in_channels * size};
        tile.y = {result, args.H_out, args.W_out * args.out_channels * (tile.finishes ? size : 4)};
        tile.row_begin = row_begin, tile.row_end = row_end;
        std::tie(tile.hidden_begin, tile.hidden_end) =
            hidden_range(args, schedule, kernel().lanes, group);
        tile.starts_with_bias = group == 0;
        for (int64_t col = 0; col < args.W_out; col += schedule.strip_cols) {
            tile.col_begin = col;
            tile.col_end = std::min(col + schedule.strip_cols, args.W_out);
            layers.run_tile(args, schedule, tile, thread_scratch);
        }
    }

    // Every image cut into bands, as many as give all threads the same number of them.
    void run_bands() const {
        const int64_t threads = at::get_num_threads();
        const int64_t steps = (args.H_out + schedule.rows_per_step - 1) / schedule.rows_per_step;
        const int64_t bands = std::min(threads / std::gcd(threads, args.N), steps);
        at::parallel_for(0, args.N * bands, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; task++) {
                const int64_t image = task / bands, band = task % bands;
                const int64_t row_begin = band * args.H_out / bands;
                const int64_t row_end = (band + 1) * args.H_out / bands;
                run_rows(image, 0, row_begin, row_end, y_of(image),
                         scratch_of(at::get_thread_num()));
            }
        });
    }

    // Two hidden groups: by one thread one after the other while there are images for most threads,
    // side by side for the few images that are left over. The same sums in the same order either
    // way.
    void run_two_groups() const {
        // The sums of the first group stand in y where these are floats.
        const auto first_of = [&](int64_t image, float* own) {
            return args.element == Element::single ? static_cast<float*>(y_of(image))
                                                   : own + layout.partial + sum_floats(args);
        };
        const int64_t threads = at::get_num_threads();
        const int64_t left_over = args.N % threads;
        const int64_t shared = 2 * left_over <= threads ? left_over : 0;
        const int64_t whole = args.N - shared;
        at::parallel_for(0, whole, 1, [&](int64_t begin, int64_t end) {
            float* const own = scratch_of(at::get_thread_num());
            for (int64_t image = begin; image < end; image++) {
                float *const first = first_of(image, own), *const second = own + layout.partial;
                run_rows(image, 0, 0, args.H_out, first, own);
                run_rows(image, 1, 0, args.H_out, second, own);
                layers.combine(args, x_of(image), first, second, y_of(image));
            }
        });
        float* const second = scratch + layout.partial;
        for (int64_t image = whole; image < args.N; image++) {
            float* const first = first_of(image, scratch);
            at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
                for (int64_t group = begin; group < end; group++)
                    run_rows(image, group, 0, args.H_out, group == 0 ? first : second,
                             scratch_of(at::get_thread_num()));
            });
            layers.combine(args, x_of(image), first, second, y_of(image));
        }
    }
};

at::Tensor inverted_residual(const at::Tensor& x, const OptionalTensor& w_expand,
                             const OptionalTensor& b_expand, const at::Tensor& w_dw,
                             const OptionalTensor& b_dw, const at::Tensor& w_project,
                             const OptionalTensor& b_project, int64_t stride,
                             at::IntArrayRef padding, int64_t dilation, bool residual,
                             at::ArrayRef<double> clip_expand, at::ArrayRef<double> clip_dw,
                             at::ArrayRef<double> clip_project) {
    Call call = make_call(x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, stride, padding,
                          dilation, residual, clip_expand, clip_dw, clip_project);
    const std::optional<Element> element = element_of(x.scalar_type());
    TORCH_CHECK_TYPE(element.has_value(),
                     "inverted_residual: x must be float32, bfloat16 or float16 for the CPU kernel,"
                     " got ",
                     x.scalar_type(), "; backend='reference' takes any floating dtype");
    if (call.sizes.N == 0) return call.y;
    BlockArgs args{};
    static_cast<BlockSizes&>(args) = call.sizes;
    args.element = *element;
    args.pairs = kernel().multiplies_pairs(args);
    const auto pointer = [&](size_t i) {
        return call.inputs[i].defined() ? call.inputs[i].const_data_ptr() : nullptr;
    };
    const auto bias = [&](size_t i) -> const float* {
        if (!call.inputs[i].defined()) return nullptr;
        call.inputs[i] = call.inputs[i].to(at::kFloat);
        return call.inputs[i].const_data_ptr<float>();
    };
    args.w_expand = pointer(1), args.b_expand = bias(2);
    args.w_dw = pointer(3), args.b_dw = bias(4);
    args.w_project = pointer(5), args.b_project = bias(6);

    const Schedule schedule = choose_schedule(args, kernel().lanes);
    print_once(args, schedule);
    const ScratchLayout layout = scratch_layout(args, schedule, kernel().lanes);
    const at::Tensor scratch =
        at::empty({at::get_num_threads() * layout.total}, at::TensorOptions().dtype(at::kFloat));
    const Job job{args,
                  schedule,
                  kernel().of(args.element),
                  static_cast<const char*>(pointer(0)),
                  static_cast<char*>(call.y.mutable_data_ptr()),
                  layout,
                  scratch.mutable_data_ptr<float>()};
    schedule.hidden_groups == 1 ? job.run_bands() : job.run_two_groups();
    return call.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mnv2, CPU, m) { m.impl("inverted_residual", &inverted_residual); }

}  // namespace mnv2::cpu
