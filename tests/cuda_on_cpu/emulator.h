// Runs the device code of a kernel on the CPU: what launch_on_cpu.h and ptx_on_cpu.h are made of.
// README.md says what is modelled. One launch at a time in a process.
#pragma once
#include <cstdint>
#include <functional>

namespace emulator {

// Which thread that can go on does, and which block comes next.
enum class Schedule {
    round_robin,   // every one in turn; blocks in order
    random_fiber,  // any; any
    greedy_warp,   // one warp as far as it can go, then another; the last block first
};

struct Options {
    Schedule schedule;
    uint32_t seed;
    bool tracking;  // of races and of bytes that nobody wrote
    int shared_bytes;
    int cluster;  // blocks of the largest cluster that the GPU can place
};

struct Counts {
    int64_t blocks, block_barriers;
    int64_t matrices, passes;  // 8x8 matrices that ldmatrix read; passes over the banks that took
};

struct Shape {
    int64_t blocks;
    int threads, shared_bytes, cluster;
};

// Of the launches that follow; forgets the message and the counts of those before.
void configure(const Options& options);
const Counts& counts();
// What went wrong in a launch, or "".
const char* message();

// Runs `thread` in every thread of the grid; false where something went wrong.
bool launch(const Shape& shape, const std::function<void()>& thread);

// ---- From here on: for the running thread, which never returns from a call that finds an error.

int thread_index();
int block_threads();
int block_index();
int grid_blocks();
void block_barrier();
void warp_barrier();

uint32_t shared_memory();
void load(uint32_t address, void* to, int bytes);
void store(uint32_t address, const void* from, int bytes);

void copy_async(uint32_t to, const void* source, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

int cluster_rank();
void cluster_barrier();
void load_cluster(uint32_t address, int rank, void* to, int bytes);

// Matrix m of `count` goes to r[m].
void load_matrices(uint32_t* r, int count, bool transposed, uint32_t row);

// One lane of sums (16 x 8) += a (16 x k) b (k x 8). `to_float` is of one element.
struct Product {
    int k;
    const char* name;
    float (*to_float)(uint16_t);
    float* sums;
    uint32_t a[4], b[2];
};
void multiply_add(Product& lane);

}  // namespace emulator
