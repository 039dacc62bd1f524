// A whole network over one image: steps that read and write one arena. No torch, no threads of its
// own.
#pragma once
#include <cstdint>
#include <variant>
#include <vector>

#include "kernels.h"
#include "run_block.h"
#include "threads.h"

namespace mnv2::cpu {

// Blocks have N = 1.
struct Step {
    std::variant<StemArgs, BlockStep, PointwiseArgs, AverageArgs, LinearArgs> layer;
    // Where the result begins in the arena, elements. The last step writes the network's result.
    int64_t output;
    // The next step takes the rows as they come: a few of them are in memory at a time.
    bool streams;
    // Where in the arena a block with a gate has kept_elements() between its two parts, elements.
    int64_t kept;
};

// Elements that a block with a gate keeps, 0 for other steps.
int64_t kept_elements(const Step& step, int64_t lanes);

// Floats of memory that `threads` threads need besides the arena.
int64_t line_floats(const std::vector<Step>& steps, int64_t lanes, int64_t threads);

// Whether the step goes through the image once, row by row. Such a step can stream and can
// overwrite its input.
bool is_row_by_row(const Step& step);

// Whether the step can follow one that streams; with a gate it is not row by row for all that.
bool takes_rows(const Step& step);

// Rows of a step's result that are in memory at a time.
int64_t rows_in_memory(const std::vector<Step>& steps, size_t number);

// Elements that `run_images` keeps of an image for the fully connected layers at the end; 0 where
// the network does not end with one, or has no other step.
int64_t classified_features(const std::vector<Step>& steps);

// x: one image; y: the result of the last step; arena: as large as the steps' outputs need it;
// lines: line_floats() of them. Both are 64-byte aligned. The same bits at any number of threads.
void run_network(const Kernel& kernel, const std::vector<Step>& steps, const void* x, void* y,
                 void* arena, float* lines, const Threads& threads);

// The same for several images, x_size bytes apart: image by image up to the fully connected layers
// at the end, which then run once for all of them, since their weights take longer to read than to
// use. features: classified_features() elements an image. The same bits as image by image.
void run_images(const Kernel& kernel, const std::vector<Step>& steps, int64_t images, const void* x,
                int64_t x_size, void* y, void* features, void* arena, float* lines,
                const Threads& threads);

}  // namespace mnv2::cpu
