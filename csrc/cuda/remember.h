// Plans of launches, remembered: some take longer to make than a launch.
#pragma once
#include <array>
#include <map>

#include "call.h"

namespace mnv2::cuda {

// What make() returns: a Plan that depends on these three alone. Every place that calls this with a
// function of its own has plans of its own.
template <class Plan, class Make>
const Plan& remembered(const BlockSizes& sizes, Element element, const Device& device,
                       Make&& make) {
    using Key = std::array<int64_t, 16>;
    thread_local std::map<Key, Plan> plans;
    const Key key{sizes.N,
                  sizes.H,
                  sizes.W,
                  sizes.H_out,
                  sizes.W_out,
                  sizes.in_channels,
                  sizes.hidden_channels,
                  sizes.out_channels,
                  sizes.kernel_size,
                  sizes.stride,
                  sizes.dilation,
                  sizes.expansion * 2 + half_sums(sizes, element),
                  device.multiprocessors,
                  device.shared_bytes,
                  device.capability,
                  device.cluster};
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
    if (plans.size() == 1024) plans.clear();
    return plans[key] = make();
}

}  // namespace mnv2::cuda
