// What the parts of the emulator share: the launch that runs, its blocks, warps and threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "tracker.h"

namespace emulator {

constexpr int kLanes = 32;
// A copy that was issued and not waited for.
struct Copy {
    uint32_t offset;
    const void* source;
    int bytes;
    int64_t group;
    bool landed;
};

struct Block;

struct Thread {
    Fiber fiber;
    Block* block;
    int index, warp, lane;
    const char* waits_for;
    std::vector<Copy> copies;
    int64_t groups;  // that were committed
};

struct Warp {
    const char* collective;  // what the lanes that came wait for
    int arrived;
    void* operands[kLanes];
    uint32_t epoch;  // warp barriers so far
};

struct Block {
    int64_t index;
    int rank;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    Tracker tracker;
    int at_barrier, ended;
};

struct Launch {
    Options options{};
    Counts counts{};
    char message[512] = "";
    std::mt19937 random;
    Shape shape{};
    const std::function<void()>* thread = nullptr;
    std::vector<std::unique_ptr<Block>> cluster;  // the blocks that run
    int at_cluster_barrier = 0;
    std::deque<Thread*> ready;
    Thread* running = nullptr;
    Fiber scheduler;
};

extern Launch state;

// Ends the launch with a sentence.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// The running thread goes on when another wakes it.
void wait(const char* reason);
void wake(Thread& thread);
// All threads of the block but one.
void wake_block(Block& block, const Thread* but);

// Every lane hands in its operands; `compute` gets those of all lanes, once.
template <class Operands, class Compute>
void collective(const char* name, Operands& mine, Compute compute) {
    Thread& self = *state.running;
    Warp& warp = self.block->warps[self.warp];
    if (warp.arrived > 0 && strcmp(warp.collective, name) != 0)
        fail("diverged: this lane is at %s, others of its warp at %s", name, warp.collective);
    warp.collective = name;
    warp.operands[self.lane] = &mine;
    if (++warp.arrived < kLanes) return wait(name);
    Operands* lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = static_cast<Operands*>(warp.operands[i]);
    compute(lanes);
    warp.arrived = 0;
    for (int i = 0; i < kLanes; i++) {
        Thread& thread = self.block->threads[self.warp * kLanes + i];
        if (&thread != &self) wake(thread);
    }
}

}  // namespace emulator
