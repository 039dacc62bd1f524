#include <algorithm>
#include <cstring>

#include "emulator.h"
#include "state.h"

namespace emulator {

namespace {

// Where dynamic shared memory starts in its window: not at 0 on a GPU of capability 9.0 either.
constexpr uint32_t kWindow = 1024;

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

// ---- Clusters

int cluster_rank() { return state.running->block->rank; }

void cluster_barrier() {
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
