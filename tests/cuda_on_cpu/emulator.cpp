#include "emulator.h"

#include <signal.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "tracker.h"

namespace emulator {

namespace {

constexpr int kLanes = 32;
// Where dynamic shared memory starts in its window: not at 0 on a GPU of capability 9.0 either.
constexpr uint32_t kWindow = 1024;

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

Launch state;

[[noreturn]] void stop() {
    switch_fiber(state.running->fiber, state.scheduler, true);
    __builtin_unreachable();
}

void note(const char* format, va_list arguments) {
    const int size = sizeof(state.message);
    int length = 0;
    if (const Thread* thread = state.running)
        length = snprintf(state.message, size,
                          "block %lld, thread %d: ", static_cast<long long>(thread->block->index),
                          thread->index);
    vsnprintf(state.message + length, size - length, format, arguments);
}

__attribute__((format(printf, 1, 2))) void note(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    note(format, arguments);
    va_end(arguments);
}

// Ends the launch. The threads are dropped where they are, so none may own anything.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    note(format, arguments);
    va_end(arguments);
    stop();
}

// An address that is nobody's, or a division by 0, in a thread of the kernel.
void on_fault(int signal, siginfo_t* info, void*) {
    if (state.running == nullptr) {
        ::signal(signal, SIG_DFL);  // Of this program then: it happens again and ends it.
        return;
    }
    if (signal == SIGFPE) fail("division by 0");
    fail("access to address %p, which is nobody's", info->si_addr);
}

// Catches faults while it lives. AddressSanitizer does so itself.
class FaultsCaught {
 public:
#ifndef __SANITIZE_ADDRESS__
    FaultsCaught() {
        static unsigned char stack[64 << 10];
        stack_t own{};
        own.ss_sp = stack;
        own.ss_size = sizeof(stack);
        sigaltstack(&own, &old_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; i++) sigaction(kSignals[i], &action, &old_[i]);
    }
    ~FaultsCaught() {
        for (int i = 0; i < 3; i++) sigaction(kSignals[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

 private:
    static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction old_[3];
    stack_t old_stack_;
#endif
};

// ---- Threads

void wait(const char* reason) {
    state.running->waits_for = reason;
    switch_fiber(state.running->fiber, state.scheduler, false);
}

void wake(Thread& thread) {
    thread.waits_for = nullptr;
    state.ready.push_back(&thread);
}

// A greedy schedule takes the newest first: the lanes of a warp that met, then another warp.
void wake_block(Block& block, const Thread* but) {
    std::vector<int> order(block.warps.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
    if (state.options.schedule != Schedule::round_robin)
        std::shuffle(order.begin(), order.end(), state.random);
    for (int warp : order)
        for (int lane = 0; lane < kLanes; lane++) {
            Thread& thread = block.threads[warp * kLanes + lane];
            if (&thread != but) wake(thread);
        }
}

Thread* next_thread() {
    std::deque<Thread*>& ready = state.ready;
    if (ready.empty()) return nullptr;
    if (state.options.schedule == Schedule::round_robin) {
        Thread* first = ready.front();
        ready.pop_front();
        return first;
    }
    if (state.options.schedule == Schedule::random_fiber)
        std::swap(ready[state.random() % ready.size()], ready.back());
    Thread* last = ready.back();
    ready.pop_back();
    return last;
}

void thread_main() {
    arrived_in_fiber(state.scheduler);
    (*state.thread)();
    Thread& self = *state.running;
    if (!self.copies.empty())
        fail("ends with %zu asynchronous copies not waited for", self.copies.size());
    Block& block = *self.block;
    if (++block.ended == static_cast<int>(block.threads.size()) && block.tracker.read_remotely())
        fail("the block ends while another may still read its shared memory");
    stop();
}

void note_stuck() {
    for (const auto& block : state.cluster)
        for (const Thread& thread : block->threads) {
            if (thread.waits_for == nullptr) continue;
            const Warp& warp = block->warps[thread.warp];
            note(
                "stuck: thread %d of block %lld waits at %s (%d threads of the block came to the "
                "block barrier, %d lanes of its warp to %s, %d threads ended)",
                thread.index, static_cast<long long>(block->index), thread.waits_for,
                block->at_barrier, warp.arrived, warp.arrived ? warp.collective : "a collective",
                block->ended);
            return;
        }
}

bool run_cluster(int64_t first_block) {
    state.ready.clear();
    state.at_cluster_barrier = 0;
    int left = 0;
    for (const auto& pointer : state.cluster) {
        Block& block = *pointer;
        block.index = first_block + block.rank;
        block.at_barrier = block.ended = 0;
        for (Warp& warp : block.warps) warp = Warp{};
        // NaN in every format.
        std::fill(block.shared.begin(), block.shared.end(), 0xff);
        block.tracker.reset(state.shape.shared_bytes);
        for (Thread& thread : block.threads) {
            thread.copies.clear();
            thread.groups = 0;
            start_fiber(thread.fiber, thread_main);
        }
        wake_block(block, nullptr);
        left += state.shape.threads;
    }
    while (left > 0) {
        Thread* thread = next_thread();
        if (thread == nullptr) {
            note_stuck();
            return false;
        }
        state.running = thread;
        switch_fiber(state.scheduler, thread->fiber, false);
        state.running = nullptr;
        if (state.message[0] != 0) return false;
        if (thread->waits_for == nullptr) left--;
    }
    state.counts.blocks += state.shape.cluster;
    return true;
}

bool fits(const Shape& shape) {
    const Options& options = state.options;
    if (shape.threads < kLanes || shape.threads > 1024 || shape.threads % kLanes != 0)
        note("%d threads a block", shape.threads);
    else if (shape.shared_bytes < 0 || shape.shared_bytes > options.shared_bytes)
        note("%d bytes of shared memory, of %d", shape.shared_bytes, options.shared_bytes);
    else if (shape.cluster < 1 || shape.cluster > 8 || shape.blocks % shape.cluster != 0)
        note("clusters of %d blocks, %lld blocks", shape.cluster,
             static_cast<long long>(shape.blocks));
    else if (shape.cluster > 1 && options.capability < 90)
        note("clusters on a GPU of capability %d", options.capability);
    return state.message[0] == 0;
}

}  // namespace

void configure(const Options& options) {
    state.options = options;
    state.counts = Counts{};
    state.message[0] = 0;
    state.random.seed(options.seed);
}

const Counts& counts() { return state.counts; }

const char* message() { return state.message; }

bool launch(const Shape& shape, const std::function<void()>& thread) {
    if (!fits(shape)) return false;
    state.shape = shape;
    state.thread = &thread;
    state.cluster.clear();
    for (int rank = 0; rank < shape.cluster; rank++) {
        state.cluster.push_back(std::make_unique<Block>());
        Block& block = *state.cluster.back();
        block.rank = rank;
        block.shared.resize(shape.shared_bytes);
        block.warps.resize(shape.threads / kLanes);
        block.threads.resize(shape.threads);
        for (int i = 0; i < shape.threads; i++) {
            Thread& t = block.threads[i];
            t.block = &block;
            t.index = i, t.warp = i / kLanes, t.lane = i % kLanes;
            t.fiber.stack = fiber_stack(rank * shape.threads + i);
        }
    }
    // No order is promised.
    std::vector<int64_t> order;
    for (int64_t first = 0; first < shape.blocks; first += shape.cluster) order.push_back(first);
    if (state.options.schedule == Schedule::greedy_warp) std::reverse(order.begin(), order.end());
    if (state.options.schedule == Schedule::random_fiber)
        std::shuffle(order.begin(), order.end(), state.random);
    const FaultsCaught faults_caught;
    bool fine = true;
    for (size_t i = 0; fine && i < order.size(); i++) fine = run_cluster(order[i]);
    state.cluster.clear();
    state.thread = nullptr;
    return fine;
}

// ---- Threads and barriers

int thread_index() { return state.running->index; }
int block_threads() { return state.shape.threads; }
int block_index() { return static_cast<int>(state.running->block->index); }
int grid_blocks() { return static_cast<int>(state.shape.blocks); }

void block_barrier() {
    Thread& self = *state.running;
    Block& block = *self.block;
    if (block.ended > 0) fail("block barrier after %d threads have ended", block.ended);
    if (++block.at_barrier < state.shape.threads) return wait("the block barrier");
    block.at_barrier = 0;
    block.tracker.pass_block_barrier();
    state.counts.block_barriers++;
    wake_block(block, &self);
}

namespace {

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

}  // namespace

void warp_barrier() {
    int nothing;
    collective("the warp barrier", nothing, [](int**) {
        const Thread& self = *state.running;
        self.block->warps[self.warp].epoch++;
    });
}

// ---- Shared memory

namespace {

uint32_t offset_of(const char* name, uint32_t address, int bytes) {
    const int64_t offset = static_cast<int64_t>(address) - kWindow;
    if (offset < 0 || offset + bytes > state.shape.shared_bytes)
        fail("%s of %d bytes at %lld of %d bytes of shared memory", name, bytes,
             static_cast<long long>(offset), state.shape.shared_bytes);
    if (offset % bytes != 0)
        fail("%s of %d bytes at %lld, which is no multiple", name, bytes,
             static_cast<long long>(offset));
    return static_cast<uint32_t>(offset);
}

Access access_of(const Thread& thread) {
    return {thread.warp, 1u << thread.lane, thread.block->warps[thread.warp].epoch};
}

void check(const char* name, uint32_t offset, const char* error) {
    if (error != nullptr) fail("%s at %u of shared memory: %s", name, offset, error);
}

void track_read(const char* name, Block& block, const Access& access, uint32_t offset, int bytes) {
    if (state.options.tracking) check(name, offset, block.tracker.read(access, offset, bytes));
}

}  // namespace

uint32_t shared_memory() { return kWindow; }

void load(uint32_t address, void* to, int bytes) {
    const uint32_t offset = offset_of("load", address, bytes);
    const Thread& self = *state.running;
    track_read("load", *self.block, access_of(self), offset, bytes);
    memcpy(to, self.block->shared.data() + offset, bytes);
}

void store(uint32_t address, const void* from, int bytes) {
    const uint32_t offset = offset_of("store", address, bytes);
    const Thread& self = *state.running;
    if (state.options.tracking)
        check("store", offset, self.block->tracker.write(access_of(self), offset, bytes));
    memcpy(self.block->shared.data() + offset, from, bytes);
}

// ---- Asynchronous copies

namespace {

void land(Block& block, Copy& copy) {
    unsigned char* to = block.shared.data() + copy.offset;
    if (copy.bytes > 0) memcpy(to, copy.source, copy.bytes);
    memset(to + copy.bytes, 0, 16 - copy.bytes);
    copy.landed = true;
}

}  // namespace

void copy_async(uint32_t to, const void* source, int bytes) {
    const uint32_t offset = offset_of("asynchronous copy", to, 16);
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0)
        fail("asynchronous copy from an address that is no multiple of 16");
    if (bytes < 0 || bytes > 16) fail("asynchronous copy of %d bytes", bytes);
    Thread& self = *state.running;
    if (state.options.tracking)
        check("asynchronous copy", offset, self.block->tracker.start_copy(access_of(self), offset));
    self.copies.push_back({offset, source, bytes, self.groups, false});
    // At once, or as late as the wait.
    if (state.random() % 2 != 0) land(*self.block, self.copies.back());
}

void copy_async_commit() { state.running->groups++; }

void copy_async_wait(int pending) {
    Thread& self = *state.running;
    const auto done = [&](const Copy& copy) { return copy.group < self.groups - pending; };
    for (Copy& copy : self.copies) {
        if (!done(copy)) continue;
        if (!copy.landed) land(*self.block, copy);
        if (state.options.tracking) self.block->tracker.end_copy(access_of(self), copy.offset);
    }
    self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), done),
                      self.copies.end());
}

// ---- Clusters. Below capability 9.0 these are what ptx.h makes of them there.

int cluster_rank() { return state.running->block->rank; }

void cluster_barrier() {
    if (state.options.capability < 90) return;
    Thread& self = *state.running;
    for (const auto& block : state.cluster)
        if (block->ended > 0) fail("cluster barrier after threads have ended");
    if (++state.at_cluster_barrier < state.shape.threads * state.shape.cluster)
        return wait("the cluster barrier");
    state.at_cluster_barrier = 0;
    for (const auto& block : state.cluster) {
        block->tracker.pass_cluster_barrier();
        wake_block(*block, &self);
    }
}

void load_cluster(uint32_t address, int rank, void* to, int bytes) {
    const uint32_t offset = offset_of("cluster load", address, bytes);
    if (state.options.capability < 90) {
        memset(to, 0, bytes);
        return;
    }
    if (rank < 0 || rank >= state.shape.cluster)
        fail("cluster load from block %d of %d", rank, state.shape.cluster);
    const Thread& self = *state.running;
    Block& block = *state.cluster[rank];
    if (&block == self.block) {
        track_read("cluster load", block, access_of(self), offset, bytes);
    } else if (state.options.tracking) {
        if (block.ended == state.shape.threads) fail("cluster load from a block that has ended");
        check("cluster load", offset, block.tracker.read_remote(offset, bytes));
    }
    memcpy(to, block.shared.data() + offset, bytes);
}

// ---- Matrices

namespace {

// Rows that start a multiple of 128 bytes apart share banks: each takes a pass of its own.
int bank_passes(const uint32_t (&rows)[8]) {
    int most = 0;
    for (uint32_t bank = 0; bank < 8; bank++) {
        int here = 0;
        for (int i = 0; i < 8; i++)
            here += rows[i] / 16 % 8 == bank && std::find(rows, rows + i, rows[i]) == rows + i;
        most = std::max(most, here);
    }
    return most;
}

struct Rows {
    uint32_t address;
    uint32_t* r;
};

void load_matrix(Rows* const (&lanes)[kLanes], int m, bool transposed, const char* name) {
    const Thread& self = *state.running;
    // The lanes that get the values are others than those that give the addresses: all of them
    // read.
    Access access = access_of(self);
    access.lanes = ~0u;
    uint32_t offsets[8];
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; row++) {
        offsets[row] = offset_of(name, lanes[m * 8 + row]->address, 16);
        track_read(name, *self.block, access, offsets[row], 16);
        memcpy(matrix[row], self.block->shared.data() + offsets[row], 16);
    }
    state.counts.matrices++;
    state.counts.passes += bank_passes(offsets);
    for (int i = 0; i < kLanes; i++) {
        const int g = i / 4, t = i % 4;
        const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
        const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        lanes[i]->r[m] = low | high << 16;
    }
}

}  // namespace

void load_matrices(uint32_t* r, int count, bool transposed, uint32_t row) {
    static const char* const names[2][5] = {
        {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"},
        {"", "ldmatrix.x1.trans", "ldmatrix.x2.trans", "", "ldmatrix.x4.trans"}};
    const char* name = names[transposed][count];
    Rows mine{row, r};
    collective(name, mine, [=](Rows* const(&lanes)[kLanes]) {
        for (int m = 0; m < count; m++) load_matrix(lanes, m, transposed, name);
    });
}

// Products of two 16-bit floats are exact in float; sums are rounded one by one, k ascending.
void multiply_add(Product& mine) {
    collective(mine.name, mine, [](Product* const(&lanes)[kLanes]) {
        const int k = lanes[0]->k;
        const auto to_float = lanes[0]->to_float;
        float a[16][16], b[16][8];
        const auto split = [&](uint32_t pair, float& low, float& high) {
            low = to_float(static_cast<uint16_t>(pair));
            high = to_float(static_cast<uint16_t>(pair >> 16));
        };
        for (int i = 0; i < kLanes; i++) {
            const int g = i / 4, t = i % 4;
            for (int r = 0; r < k / 4; r++) {
                float* to = a[g + r % 2 * 8] + 2 * t + r / 2 * 8;
                split(lanes[i]->a[r], to[0], to[1]);
            }
            for (int r = 0; r < k / 8; r++)
                split(lanes[i]->b[r], b[2 * t + r * 8][g], b[2 * t + 1 + r * 8][g]);
        }
        for (int i = 0; i < kLanes; i++)
            for (int s = 0; s < 4; s++) {
                const int row = i / 4 + s / 2 * 8, col = i % 4 * 2 + s % 2;
                float& sum = lanes[i]->sums[s];
                for (int j = 0; j < k; j++) sum += a[row][j] * b[j][col];
            }
    });
}

}  // namespace emulator
