// What Python needs to know about the build; the op itself goes through the dispatcher. Importing
// this module is what loads the TORCH_LIBRARY_IMPL blocks.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/kernels.h"
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
        row["available"] = mnv2::cpu::runs_on(kernel, capability.c_str());
        row["selected"] = &kernel == &mnv2::cpu::select_kernel(capability.c_str());
        rows.append(row);
    }
    return rows;
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["source_hash"] = MNV2_SOURCE_HASH;
    info["compiler"] = __VERSION__;
    info["torch"] = TORCH_VERSION;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
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
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) elapsed[i] = kernel.time_fma(rounds);
    });
    double flops_per_second = 0;
    for (const double t : elapsed)
        flops_per_second += static_cast<double>(rounds) * kernel.flops_per_round / t;
    return flops_per_second / 1e9;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of mnv2_kernels; the op is torch.ops.mnv2.inverted_residual.";
    m.def("cpu_kernels", &cpu_kernels, "CPU kernels by instruction set, best first.");
    m.def("build_info", &build_info, "Compiler, torch version, OpenMP and hash of the sources.");
    m.def("fma_peak", &fma_peak, pybind11::arg("kernel"), pybind11::arg("threads"),
          pybind11::arg("seconds"), pybind11::call_guard<pybind11::gil_scoped_release>(),
          "GFLOP/s of multiply-adds in registers: the bound that benchmarks divide by.");
}
