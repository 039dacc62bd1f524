// A bias that may be missing, of channels that may not exist.
#pragma once
#include "ptx.h"

namespace mnv2::cuda {

MNV2_DEVICE float bias_or_zero(const float* bias, int64_t channel, int64_t channels) {
    return bias != nullptr && channel < channels ? bias[channel] : 0.f;
}

}  // namespace mnv2::cuda
