// The caller's threads and their memory: kernels own neither. No torch.
#pragma once
#include <cstdint>
#include <functional>

namespace mnv2::cpu {

struct Threads {
    using Task = std::function<void(int64_t number, int64_t thread)>;

    int64_t count;
    // Calls task(number, thread) for all numbers in [0, tasks). Tasks that run at the same time
    // have different threads, all below `count` where there are no more tasks than that.
    std::function<void(int64_t tasks, const Task& task)> run;
};

// Memory of every thread, 64-byte aligned.
struct Scratch {
    float* begin;
    int64_t floats;  // of one thread

    float* of(int64_t thread) const { return begin + thread * floats; }
};

}  // namespace mnv2::cpu
