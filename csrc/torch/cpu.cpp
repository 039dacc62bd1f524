#include "cpu.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

namespace mnv2::cpu {

const Kernel& kernel() {
    static const Kernel& selected = select_kernel(at::get_cpu_capability().c_str());
    return selected;
}

Threads torch_threads(int64_t count) {
    if (count == 1)
        return {1, [](int64_t tasks, const Threads::Task& task) {
                    for (int64_t i = 0; i < tasks; i++) task(i, 0);
                }};
    return {count, [](int64_t tasks, const Threads::Task& task) {
                at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++) task(i, at::get_thread_num());
                });
            }};
}

}  // namespace mnv2::cpu
