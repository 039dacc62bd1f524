// What happened to the shared memory of a block, 2 bytes at a time, and whether an access may
// happen now: whatever the schedule, two accesses of which one is a write need a barrier between
// them.
#pragma once
#include <cstdint>
#include <vector>

namespace emulator {

// Lanes of one warp, between its warp barriers `epoch` - 1 and `epoch`.
struct Access {
    int warp;
    uint32_t lanes;
    uint32_t epoch;
};

class Tracker {
 public:
    void reset(int shared_bytes) {
        granules_.assign((shared_bytes + 1) / 2, Granule{});
        epoch_ = cluster_epoch_ = 1;
        shared_epoch_ = remote_read_epoch_ = 0;
    }

    void pass_block_barrier() { epoch_++; }
    void pass_cluster_barrier() { shared_epoch_ = epoch_++, cluster_epoch_++; }
    // Another block has read this one's memory since the last cluster barrier.
    bool read_remotely() const { return remote_read_epoch_ == cluster_epoch_; }

    // The following return what is wrong, or nullptr.
    const char* read(const Access& access, uint32_t offset, int bytes) {
        for (uint32_t i = offset / 2; i < (offset + bytes) / 2; i++) {
            Granule& granule = granules_[i];
            if (const char* error = unreadable(granule)) return error;
            if (!follows_write(granule, access)) return "race: read of what another thread wrote";
            note_read(granule, access);
        }
        return nullptr;
    }

    const char* read_remote(uint32_t offset, int bytes) {
        for (uint32_t i = offset / 2; i < (offset + bytes) / 2; i++) {
            Granule& granule = granules_[i];
            if (const char* error = unreadable(granule)) return error;
            if (granule.write_epoch > shared_epoch_)
                return "race: read of what another block wrote, no cluster barrier since";
            granule.remote_read = cluster_epoch_;
        }
        remote_read_epoch_ = cluster_epoch_;
        return nullptr;
    }

    const char* write(const Access& access, uint32_t offset, int bytes) {
        for (uint32_t i = offset / 2; i < (offset + bytes) / 2; i++) {
            Granule& granule = granules_[i];
            if (const char* error = unwritable(granule, access)) return error;
            note_write(granule, access);
        }
        return nullptr;
    }

    const char* start_copy(const Access& access, uint32_t offset) {
        for (uint32_t i = offset / 2; i < offset / 2 + 8; i++) {
            Granule& granule = granules_[i];
            if (const char* error = unwritable(granule, access)) return error;
            granule.state = in_flight;
        }
        return nullptr;
    }

    // The thread that copied has waited: from here on it is a write like another.
    void end_copy(const Access& access, uint32_t offset) {
        for (uint32_t i = offset / 2; i < offset / 2 + 8; i++) note_write(granules_[i], access);
    }

 private:
    enum State : uint8_t { fresh, in_flight, written };

    // Epochs count barriers of the block; those of a warp, its own. The lanes of a read are of its
    // newest warp epoch, and only where one warp alone has read: no more is ever asked for.
    struct Granule {
        uint32_t write_epoch = 0, write_warp_epoch = 0, write_lanes = 0;
        uint32_t read_epoch = 0, read_warp_epoch = 0, read_warps = 0, read_lanes = 0;
        uint32_t remote_read = 0;
        uint8_t write_warp = 0;
        State state = fresh;
    };

    static const char* unreadable(const Granule& granule) {
        if (granule.state == fresh) return "nobody has written this";
        if (granule.state == in_flight)
            return "race: an asynchronous copy to it was not waited for";
        return nullptr;
    }

    bool follows_write(const Granule& granule, const Access& access) const {
        if (granule.write_epoch < epoch_) return true;
        if (granule.write_warp != access.warp) return false;
        return granule.write_warp_epoch < access.epoch || granule.write_lanes == access.lanes;
    }

    bool follows_reads(const Granule& granule, const Access& access) const {
        if (granule.read_epoch < epoch_) return true;
        if (granule.read_warps != 1u << access.warp) return false;
        return granule.read_warp_epoch < access.epoch || granule.read_lanes == access.lanes;
    }

    const char* unwritable(const Granule& granule, const Access& access) const {
        if (granule.state == in_flight)
            return "race: an asynchronous copy to it was not waited for";
        if (!follows_write(granule, access)) return "race: write over what another thread wrote";
        if (!follows_reads(granule, access)) return "race: write over what another thread reads";
        if (granule.remote_read == cluster_epoch_) return "race: write over what a block reads";
        return nullptr;
    }

    void note_read(Granule& granule, const Access& access) {
        const uint32_t warp = 1u << access.warp;
        if (granule.read_epoch != epoch_) {
            granule.read_epoch = epoch_;
            granule.read_warps = warp;
            granule.read_lanes = 0;
        }
        granule.read_warps |= warp;
        if (granule.read_warp_epoch != access.epoch) granule.read_lanes = 0;
        granule.read_warp_epoch = access.epoch;
        granule.read_lanes |= access.lanes;
    }

    void note_write(Granule& granule, const Access& access) {
        granule.state = written;
        granule.write_epoch = epoch_;
        granule.write_warp = static_cast<uint8_t>(access.warp);
        granule.write_warp_epoch = access.epoch;
        granule.write_lanes = access.lanes;
    }

    std::vector<Granule> granules_;
    uint32_t epoch_ = 1, cluster_epoch_ = 1;
    uint32_t shared_epoch_ = 0;       // of the block, at the last cluster barrier
    uint32_t remote_read_epoch_ = 0;  // of the cluster, at the last read from another block
};

}  // namespace emulator
