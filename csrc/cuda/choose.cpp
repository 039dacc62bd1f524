#include "choose.h"

#include "patch/plan.h"
#include "tile/plan.h"

namespace mnv2::cuda {

const char* name(Kernel kernel) {
    switch (kernel) {
        case Kernel::patch:
            return "patch";
        case Kernel::tile:
            return "tile";
        case Kernel::generic:
            return "generic";
    }
    return "";
}

Kernel choose(const BlockSizes& sizes, Element element) {
    if (patch_takes(sizes, element)) return Kernel::patch;
    if (tile_takes(sizes, element)) return Kernel::tile;
    return Kernel::generic;
}

}  // namespace mnv2::cuda
