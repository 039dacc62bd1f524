// A whole network over one image: steps that read and write one arena. No torch, no threads of its
// own.
#pragma once
#include <cstdint>
#include <functional>
#include <variant>
#include <vector>

#include "kernels.h"

namespace mnv2::cpu {

struct BlockStep {
    BlockArgs args;
    Schedule schedule;
};

struct Step {
    std::variant<StemArgs, BlockStep, PoolArgs, LinearArgs> layer;
    // Where the result begins in the arena, elements; of the last step it is the network's.
    int64_t output;
    // The next step takes the rows as they come: there are never more than a few of them.
    bool streams;
};

// How the threads share an image: calls task(i, thread) for i in [0, count).
struct Threads {
    int64_t count;
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& task)> run;
};

// Floats of memory that `threads` threads need beside the arena.
int64_t line_floats(const std::vector<Step>& steps, int64_t lanes, int64_t threads);

// Whether the step can stream, follow one that does, or overwrite its input: it goes through the
// image once, row by row.
bool is_row_by_row(const Step& step);

// Rows of a step's result that are in memory at a time.
int64_t rows_in_memory(const std::vector<Step>& steps, size_t number);

// Elements of an image's input of the classifier, where the network ends with one and has more; 0
// elsewhere.
int64_t classified_features(const std::vector<Step>& steps);

// x: one image; y: the result of the last step; arena: as large as the steps' outputs need it;
// lines: line_floats() of them. Both are 64-byte aligned. The same bits at any number of threads.
void run_network(const Kernel& kernel, const std::vector<Step>& steps, const void* x, void* y,
                 void* arena, float* lines, const Threads& threads);

// The same of a few images one after the other, x_size bytes apart, but for the classifier:
// it is computed for all at once, since reading its weights takes longer than to use
// them. features: classified_features() elements an image. The same bits as image by image.
void run_images(const Kernel& kernel, const std::vector<Step>& steps, int64_t images, const void* x,
                int64_t x_size, void* y, void* features, void* arena, float* lines,
                const Threads& threads);

}  // namespace mnv2::cpu
