// A plan as the op gets it (lists of integers, bounds and weights), read into the steps of a
// network.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../cpu/network.h"

namespace mnv2::cpu {

// Kinds of steps, numbered from 0: names and order as in `Kind` of
// mnv2_kernels/network/program.py.
enum class Kind { stem, block, pool, linear, pointwise };

using WeightList = c10::List<std::optional<at::Tensor>>;

struct Network {
    int64_t channels, H, W;  // of x
    int64_t arena;           // elements, for one image
    std::vector<Step> steps;
    std::vector<int64_t> y_shape;  // of one image
};

// Everything is in the order of `Program` in mnv2_kernels/network/program.py; x, weights and the
// arena consist of `element`. Without weights the steps have sizes only. Raises ValueError
// where the lists do not make a network.
Network read_network(at::IntArrayRef integers, at::ArrayRef<double> bounds,
                     const WeightList* weights, Element element, const Kernel& kernel);

}  // namespace mnv2::cpu
