// Which kernel runs a block: a pure function of the block and of what its numbers are. It never
// asks for the batch, so an image gives the same bits in any.
#pragma once
#include "call.h"

namespace mnv2::cuda {

enum class Kernel {
    patch,    // patches of output pixels in registers: few channels, large images
    tile,     // a tile of the image in shared memory: many channels, and blocks without expansion
    generic,  // every shape and number, without tensor cores
};

const char* name(Kernel kernel);

// The first of the above that takes the block.
Kernel choose(const BlockSizes& sizes, Element element);

}  // namespace mnv2::cuda
