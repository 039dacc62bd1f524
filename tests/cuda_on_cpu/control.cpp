// What Python tells the emulator and asks it (tests/helpers/emulated_cuda.py).
#include "emulator.h"

extern "C" {

void mnv2_configure(int schedule, uint32_t seed, int tracking, int shared_bytes, int cluster) {
    emulator::configure(
        {static_cast<emulator::Schedule>(schedule), seed, tracking != 0, shared_bytes, cluster});
}

const char* mnv2_message() { return emulator::message(); }

void mnv2_counts(int64_t* to) {
    const emulator::Counts& counts = emulator::counts();
    to[0] = counts.blocks, to[1] = counts.block_barriers;
    to[2] = counts.matrices, to[3] = counts.passes;
}

}  // extern "C"
