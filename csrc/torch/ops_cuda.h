// What Python asks of the CUDA kernels.
#pragma once

namespace mnv2::cuda {

// Whether this build has code for a GPU; compute capabilities below 8.0 are not looked at.
bool runs_on_gpu(int index);

}  // namespace mnv2::cuda
