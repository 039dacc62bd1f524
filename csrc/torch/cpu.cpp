#include "cpu.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "../cpu/sizes.h"

#if AT_PARALLEL_OPENMP && defined(__linux__)
#define MNV2_CALLS_OPENMP
// torch's own OpenMP, called by name: `#pragma omp`, which at::parallel_for has in its header, is
// the compiler's OpenMP. clang has another one than torch, and both in a process do not know each
// other's threads.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace mnv2::cpu {

const Kernel& kernel() {
    static const Kernel& selected = select_kernel(at::get_cpu_capability().c_str());
    return selected;
}

namespace {

void run_alone(int64_t tasks, const Threads::Task& task) {
    for (int64_t i = 0; i < tasks; i++) task(i, 0);
}

#ifdef MNV2_CALLS_OPENMP

struct Team {
    int64_t tasks;
    const Threads::Task& task;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
};

// What each thread runs: neighbouring tasks, the same for the same number of threads.
void run_share(void* data) {
    Team& team = *static_cast<Team*>(data);
    const int64_t thread = omp_get_thread_num();
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), team.tasks);
    const int64_t each = ceil_div(team.tasks, threads);
    try {
        const c10::ParallelGuard guard(true);
        const int64_t end = std::min(team.tasks, (thread + 1) * each);
        for (int64_t i = thread * each; i < end; i++) team.task(i, thread);
    } catch (...) {
        if (!team.failed.test_and_set()) team.error = std::current_exception();
    }
}

void run_together(int64_t tasks, const Threads::Task& task) {
    if (tasks <= 1 || at::in_parallel_region() || at::get_num_threads() == 1)
        return run_alone(tasks, task);
    Team team{tasks, task};
    GOMP_parallel(run_share, &team, 0, 0);
    if (team.error) std::rethrow_exception(team.error);
}

#else

void run_together(int64_t tasks, const Threads::Task& task) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) task(i, at::get_thread_num());
    });
}

#endif

}  // namespace

Threads torch_threads(int64_t count) { return {count, count == 1 ? run_alone : run_together}; }

}  // namespace mnv2::cpu
