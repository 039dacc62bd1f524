// csrc/cuda/launch.h for the emulator.
#pragma once
#include <tuple>
#include <type_traits>

#include "emulator.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace mnv2::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, const Device&, cudaStream_t,
                   Arguments&&... arguments) {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...));
    static_assert((sizeof(Parameters) + ... + 0) <= 4096);
    if (grid.blocks < 1 || grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    const emulator::Shape shape{grid.blocks, grid.threads, grid.shared_bytes, grid.cluster};
    const bool fine = emulator::launch(shape, [&] { std::apply(kernel, parameters); });
    return fine ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace mnv2::cuda
