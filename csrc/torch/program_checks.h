// What has to hold of the steps of a program before they run: every pointer in a kernel follows
// from it. Raises ValueError.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "program.h"

namespace mnv2::cpu {

// A tensor between two steps: where it is in the arena, -1: not there, and its shape.
struct Between {
    int64_t offset, channels, H, W;
    bool is_image;  // otherwise a vector, and H and W are 1
    int64_t size() const { return channels * H * W; }
};

// The result of a step, in no place yet.
Between result_of(const Step& step);

// How many numbers a tensor of these sizes has, all of them at least 1; raises where sums
// over tensors, in bytes and for every thread, could overflow.
int64_t count_of(std::initializer_list<int64_t> sizes);

// Everything about a step's sizes, once the steps before it are right.
void check_sizes(const Step& step, int64_t number, const Between& x);

// Everything that a kernel takes for granted of what streams and, where the steps have places, of
// these. shapes[0] is x's, and shapes[i + 1] the shape of the result of step i.
void check_places(const Network& network, const std::vector<Between>& shapes, int64_t lanes,
                  bool placed);

}  // namespace mnv2::cpu
