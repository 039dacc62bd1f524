#include "emulator.h"

#include <signal.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "state.h"

namespace emulator {

Launch state;

namespace {

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

}  // namespace

// The threads are dropped where they are, so none may own anything.
void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    note(format, arguments);
    va_end(arguments);
    stop();
}

namespace {

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

}  // namespace

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

namespace {

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
    else if (shape.cluster < 1 || shape.blocks % shape.cluster != 0)
        note("clusters of %d blocks, %lld blocks", shape.cluster,
             static_cast<long long>(shape.blocks));
    else if (shape.cluster > options.cluster)
        note("clusters of %d blocks, of which the GPU can place %d", shape.cluster,
             options.cluster);
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

void warp_barrier() {
    int nothing;
    collective("the warp barrier", nothing, [](int**) {
        const Thread& self = *state.running;
        self.block->warps[self.warp].epoch++;
    });
}

}  // namespace emulator
