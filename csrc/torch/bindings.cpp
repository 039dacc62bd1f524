// What Python needs to know about the build; the op itself goes through the dispatcher. Importing
// this module is what loads the TORCH_LIBRARY_IMPL blocks.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/choose.h"
#include "cpu.h"
#include "cuda_build.h"
#include "guard.h"
#include "host.h"
#include "ops_cuda.h"
#include "plain_call.h"
#include "program.h"
#include "source_hash.h"

namespace {

using mnv2::cpu::Kernel;

// The table of CPU kernels, best first, as a list of dicts.
pybind11::list cpu_kernels() {
    const std::string capability = at::get_cpu_capability();
    pybind11::list rows;
    for (int i = 0; i < mnv2::cpu::kKernelCount; i++) {
        const Kernel& kernel = *mnv2::cpu::kKernels[i];
        pybind11::dict row;
        row["name"] = kernel.name;
        row["lanes"] = kernel.lanes;
        row["pairs"] = kernel.multiplies_pairs();
        row["available"] = mnv2::cpu::runs_on(kernel, capability.c_str());
        row["selected"] = &kernel == &mnv2::cpu::kernel();
        rows.append(row);
    }
    return rows;
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["source_hash"] = MNV2_SOURCE_HASH;
    info["compiler"] = __VERSION__;
    info["torch"] = TORCH_VERSION;
#ifdef MNV2_CUDA_VERSION
    info["cuda"] = MNV2_CUDA_VERSION;
#else
    info["cuda"] = pybind11::none();
    info["why_no_cuda"] = MNV2_WHY_NO_CUDA;
#endif
    return info;
}

mnv2::Element element(const std::string& dtype) {
    if (dtype == "float16") return mnv2::Element::half;
    if (dtype == "bfloat16") return mnv2::Element::bfloat16;
    if (dtype == "float32") return mnv2::Element::single;
    throw pybind11::value_error("dtype must be float16, bfloat16 or float32, got '" + dtype + "'");
}

using Bounds = std::pair<double, double>;

mnv2::Clip clip(const Bounds& bounds) {
    return {static_cast<float>(bounds.first), static_cast<float>(bounds.second)};
}

// The CUDA kernel that runs a block on x (N, in_channels, height, width), whatever N. A pure
// function: needs no GPU.
const char* cuda_kernel(int64_t in_channels, int64_t hidden_channels, int64_t out_channels,
                        bool expansion, int64_t kernel_size, int64_t stride, int64_t dilation,
                        const std::array<int64_t, 4>& padding, bool residual,
                        const Bounds& clip_expand, const Bounds& clip_dw,
                        const Bounds& clip_project, int64_t height, int64_t width,
                        const std::string& dtype) {
    mnv2::BlockSizes sizes{};
    sizes.N = 1, sizes.H = height, sizes.W = width;
    sizes.H_out = mnv2::output_size(height, kernel_size, stride, padding[0] + padding[2], dilation);
    sizes.W_out = mnv2::output_size(width, kernel_size, stride, padding[1] + padding[3], dilation);
    sizes.in_channels = in_channels, sizes.hidden_channels = hidden_channels;
    sizes.out_channels = out_channels;
    sizes.kernel_size = kernel_size, sizes.stride = stride, sizes.dilation = dilation;
    sizes.pad_top = padding[0], sizes.pad_left = padding[1];
    sizes.clip_expand = clip(clip_expand), sizes.clip_dw = clip(clip_dw);
    sizes.clip_project = clip(clip_project);
    sizes.expansion = expansion, sizes.residual = residual;
    return mnv2::cuda::name(mnv2::cuda::choose(sizes, element(dtype)));
}

const Kernel& available_kernel(const std::string& name) {
    const std::string capability = at::get_cpu_capability();
    for (int i = 0; i < mnv2::cpu::kKernelCount; i++) {
        const Kernel& kernel = *mnv2::cpu::kKernels[i];
        if (name == kernel.name && mnv2::cpu::runs_on(kernel, capability.c_str())) return kernel;
    }
    throw pybind11::value_error("fma_peak: kernel must be one that runs here, got '" + name + "'");
}

// GFLOP/s of multiply-adds in registers with `threads` threads, measured for about `seconds`.
double fma_peak(const std::string& name, int64_t threads, double seconds) {
    const Kernel& kernel = available_kernel(name);
    const int64_t probe = 100000;
    const double probe_seconds = std::min(kernel.time_fma(probe), kernel.time_fma(probe));
    const int64_t rounds =
        std::max<int64_t>(1, static_cast<int64_t>(probe * seconds / probe_seconds));
    std::vector<double> elapsed(threads);
    mnv2::cpu::torch_threads(threads).run(
        threads, [&](int64_t i, int64_t) { elapsed[i] = kernel.time_fma(rounds); });
    double flops_per_second = 0;
    for (const double t : elapsed)
        flops_per_second += static_cast<double>(rounds) * kernel.flops_per_round / t;
    return flops_per_second / 1e9;
}

// What a program needs besides its arena, and which of its steps go through the image row by row.
pybind11::dict describe_program(const std::vector<int64_t>& integers,
                                const std::vector<double>& bounds, const std::string& dtype,
                                int64_t threads) {
    const Kernel& kernel = mnv2::cpu::kernel();
    const auto network = mnv2::cpu::read_network(integers, bounds, nullptr, element(dtype), kernel);
    pybind11::list row_by_row, takes_rows, kept, rows;
    for (size_t i = 0; i < network.steps.size(); i++) {
        row_by_row.append(mnv2::cpu::is_row_by_row(network.steps[i]));
        takes_rows.append(mnv2::cpu::takes_rows(network.steps[i]));
        kept.append(mnv2::cpu::kept_elements(network.steps[i], kernel.lanes));
        rows.append(mnv2::cpu::rows_in_memory(network.steps, i));
    }
    pybind11::dict description;
    description["row_by_row"] = row_by_row;
    description["takes_rows"] = takes_rows;
    description["kept"] = kept;
    description["rows_in_memory"] = rows;
    description["line_bytes"] = 4 * mnv2::cpu::line_floats(network.steps, kernel.lanes, threads);
    return description;
}

pybind11::object take_guard(const pybind11::list& objects, const pybind11::list& names) {
    auto taken = mnv2::Guard::take(objects, names);
    if (!taken) return pybind11::none();
    return pybind11::make_tuple(std::move(taken->guard), taken->dicts, taken->alive);
}

int check_guard(mnv2::Guard& guard, const pybind11::list& objects, const pybind11::list& dicts,
                const pybind11::list& alive) {
    return static_cast<int>(guard.check(objects, dicts, alive));
}

// Of the inputs of the node that the autograd engine runs now, in this thread: which need a
// gradient in this backward pass.
std::vector<bool> asked_for() {
    const auto node = torch::autograd::get_current_node();
    std::vector<bool> asked(node ? node->num_outputs() : 0);
    for (size_t i = 0; i < asked.size(); i++) asked[i] = node->task_should_compute_output(i);
    return asked;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of mnv2_kernels; the op is torch.ops.mnv2.inverted_residual.";
    m.def("cpu_kernels", &cpu_kernels, "CPU kernels by instruction set, best first.");
    m.def("build_info", &build_info,
          "Compiler, torch version, CUDA version and hash of the sources.");
    m.def("asked_for", &asked_for,
          "Which tensors of the autograd function whose backward pass runs need a gradient in it.");
    using pybind11::arg;
    m.def("cuda_kernel", &cuda_kernel, arg("in_channels"), arg("hidden_channels"),
          arg("out_channels"), arg("expansion"), arg("kernel_size"), arg("stride"), arg("dilation"),
          arg("padding"), arg("residual"), arg("clip_expand"), arg("clip_dw"), arg("clip_project"),
          arg("height"), arg("width"), arg("dtype"),
          "Name of the CUDA kernel that runs a block on images of this size.");
#ifdef MNV2_CUDA_VERSION
    m.def("cuda_runs_on", &mnv2::cuda::runs_on_gpu, arg("index"),
          "Whether the CUDA kernels of this build have code for a GPU.");
#endif
    m.def("describe_program", &describe_program, pybind11::arg("program"), pybind11::arg("bounds"),
          pybind11::arg("dtype"), pybind11::arg("threads"),
          "Bytes of line buffers of a program, and which steps go row by row.");
    m.def("is_plain_call", &mnv2::is_plain_call, arg("x"), arg("harmless"),
          "Whether a call with x is for inference on a CPU and nobody looks at its layers.");
    pybind11::class_<mnv2::Guard>(m, "Guard", "What objects, their dicts and tensors were.")
        .def_static("take", &take_guard, arg("objects"), arg("names"),
                    "The guard of objects, their dicts and those under names in them, these dicts,"
                    " and what to keep alive for it; None: changes cannot be seen.")
        .def("check", &check_guard, arg("objects"), arg("dicts"), arg("alive"),
             "What has changed: 0 nothing, 1 facts of tensors, 2 anything else. After 1, what is"
             " there now counts as known.")
        .def("requires_grad", &mnv2::Guard::requires_grad,
             "Whether any tensor required gradients at the last look.")
        .def("changes", &mnv2::Guard::changes, "How often facts of tensors have changed.");
    m.def("fma_peak", &fma_peak, arg("kernel"), arg("threads"), arg("seconds"),
          pybind11::call_guard<pybind11::gil_scoped_release>(),
          "GFLOP/s of multiply-adds in registers: the bound that benchmarks divide by.");
}
