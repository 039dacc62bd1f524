// The depthwise convolution of the tile kernel, from one tile in shared memory to another.
//
// A job is a few channels of a strip, two output columns wide. The thread walks down it and keeps
// the sums of all output rows that the row of pixels at hand adds to.
#pragma once
#include "products.cuh"

namespace mnv2::cuda::tile {

// The channels of a job, of weights, pixels and sums; sums in T, or in float.
template <class T, bool HalfSums>
struct Channels;

template <class T>
struct Channels<T, true> {
    using Packed = uint2;
    Pair v[2];

    MNV2_DEVICE static Channels bias(SharedAddress from) {
        const float2 low = load_shared<float2>(from), high = load_shared<float2>(from + 8);
        return {{pack<T>(low.x, low.y), pack<T>(high.x, high.y)}};
    }
    MNV2_DEVICE static Channels from(Packed packed) { return {{packed.x, packed.y}}; }
    MNV2_DEVICE void add(const Channels& a, const Channels& b) {
        v[0] = multiply_add<T>(a.v[0], b.v[0], v[0]);
        v[1] = multiply_add<T>(a.v[1], b.v[1], v[1]);
    }
    MNV2_DEVICE Packed result(const PairClip& clip) const {
        return make_uint2(clipped<T>(v[0], clip), clipped<T>(v[1], clip));
    }
};

template <class T>
struct Channels<T, false> {
    using Packed = uint32_t;
    float2 v;

    MNV2_DEVICE static Channels bias(SharedAddress from) { return {load_shared<float2>(from)}; }
    MNV2_DEVICE static Channels from(Packed packed) { return {unpack<T>(packed)}; }
    MNV2_DEVICE void add(const Channels& a, const Channels& b) {
        v = make_float2(fmaf(a.v.x, b.v.x, v.x), fmaf(a.v.y, b.v.y, v.y));
    }
    MNV2_DEVICE Packed result(const PairClip& clip) const {
        return clipped<T>(pack<T>(v.x, v.y), clip);
    }
};

// What a thread has to know of a job.
struct Job {
    int place;    // of its first tap in the haloed tile
    int pixel;    // its first output pixel in the tile
    int rows;     // of output; 0: nothing to do
    bool second;  // whether the second column is in the tile
};

// As write_jobs has it.
MNV2_DEVICE Job read_job(SharedAddress from) {
    const uint2 v = load_shared<uint2>(from);
    return {static_cast<int>(v.x & 0xffff), static_cast<int>(v.y & 0xffff),
            static_cast<int>(v.x >> 16), v.y >> 16 != 0};
}

// The walk of one job. Step: rows of pixels from the taps of one output row to those of the next.
// They come in groups of Step: group u starts the sums of output row u and ends those of row u -
// kRing + 1.
template <class T, int KernelSize, int Step, bool HalfSums>
struct Walk {
    static constexpr int kRing = (KernelSize + Step - 1) / Step;
    // Of the first group: rows that no tap reads.
    static constexpr int kUnused = kRing * Step - KernelSize;
    static constexpr int kCols = Step * (kTileStrip - 1) + KernelSize;
    using Sums = Channels<T, HalfSums>;
    using Packed = typename Sums::Packed;

    const Packed (&weight)[KernelSize * KernelSize];
    const Sums& bias;
    const PairClip& clip;
    const TileSteps& steps;
    SharedAddress from, to;
    int rows;
    bool second;
    Sums ring[kRing][kTileStrip];

    MNV2_DEVICE void run() {
#pragma unroll
        for (int slot = 0; slot < kRing; slot++)
            for (int s = 0; s < kTileStrip; s++) ring[slot][s] = bias;
#pragma unroll 1
        for (int group = 0; group < rows + kRing - 1; group += kRing) run_slots<0>(group);
    }

    // Groups `group` and up to kRing - 1 more. The sums of output row u lie in slot u % kRing.
    template <int Slot>
    MNV2_DEVICE void run_slots(int group) {
        add_group<Slot>(group == 0);
        constexpr int last = (Slot + 1) % kRing;
        if (group >= kRing - 1) {
            store(to, ring[last][0]);
            if (second) store(to + steps.to_col, ring[last][1]);
            to += steps.to_row;
        }
        if constexpr (Slot + 1 < kRing)
            if (group + 1 < rows + kRing - 1) run_slots<Slot + 1>(group + 1);
    }

    template <int Slot>
    MNV2_DEVICE void add_group(bool first) {
#pragma unroll
        for (int s = 0; s < kTileStrip; s++) ring[Slot][s] = bias;
#pragma unroll
        for (int v = 0; v < Step; v++) {
            const SharedAddress row = v < kUnused && first ? from + steps.from_row : from;
            from += steps.from_row;
#pragma unroll
            for (int c = 0; c < kCols; c++) {
                const Sums pixel = Sums::from(load_shared<Packed>(row + c * steps.from_col));
#pragma unroll
                for (int j = 0; j < kRing; j++) {
                    const int tap_row = j * Step + v - kUnused;
#pragma unroll
                    for (int s = 0; s < kTileStrip; s++) {
                        const int tap = c - s * Step;
                        if (tap_row < 0 || tap < 0 || tap >= KernelSize) continue;
                        ring[(Slot - j + kRing) % kRing][s].add(
                            pixel, Sums::from(weight[tap_row * KernelSize + tap]));
                    }
                }
            }
        }
    }

    MNV2_DEVICE void store(SharedAddress address, const Sums& sums) const {
        store_shared(address, sums.result(clip));
    }
};

// The projection takes channels by 16: zeros between `channels` and `padded`.
MNV2_DEVICE void fill_up_channels(const TilePlan& plan, SharedAddress d, int channels, int padded) {
    if (channels == padded) return;
#pragma unroll 1
    for (int pixel = thread_index(); pixel < plan.pixels; pixel += block_threads())
        store_shared(d + (pixel * plan.d_pitch + channels) * 2, make_uint4(0, 0, 0, 0));
}

// The channels of a chunk, for every output pixel of the tile.
template <class T, int KernelSize, int Step, bool HalfSums>
MNV2_DEVICE void depthwise(const TileCall& arguments, SharedAddress shared, int chunk) {
    const Call& call = arguments.call;
    const TilePlan& plan = arguments.plan;
    const ChunkWeights weights = chunk_weights(plan, shared, chunk);
    const int channels = channels_of_chunk(call, plan, chunk);
    fill_up_channels(plan, shared + plan.d, channels, padded_channels(call, plan, chunk));
    using TheWalk = Walk<T, KernelSize, Step, HalfSums>;
    using Packed = typename TheWalk::Packed;
    constexpr int job_channels = sizeof(Packed) / 2;
    const int lanes = plan.chunk / job_channels, channel = thread_index() % lanes * job_channels;
    if (channel >= channels) return;
    Packed weight[KernelSize * KernelSize];
#pragma unroll
    for (int tap = 0; tap < KernelSize * KernelSize; tap++)
        weight[tap] = load_shared<Packed>(weights.w_dw + (tap * plan.chunk + channel) * 2);
    const auto bias = Channels<T, HalfSums>::bias(weights.b_dw + channel * 4);
#pragma unroll 1
    for (int i = thread_index() / lanes; i < plan.jobs; i += block_threads() / lanes) {
        const Job job = read_job(shared + plan.job_table + i * 8);
        if (job.rows == 0) continue;
        TheWalk walk{weight,
                     bias,
                     arguments.clip_dw,
                     plan.steps,
                     shared + plan.e + (job.place * plan.e_pitch + channel) * 2,
                     shared + plan.d + (job.pixel * plan.d_pitch + channel) * 2,
                     job.rows,
                     job.second};
        // The first group begins with the rows that no tap reads.
        walk.from -= TheWalk::kUnused * plan.steps.from_row;
        walk.run();
    }
}

template <class T, int KernelSize, bool HalfSums>
MNV2_DEVICE void depthwise_of_chunk(const TileCall& arguments, SharedAddress shared, int chunk) {
    if (arguments.call.stride > arguments.call.dilation) {
        depthwise<T, KernelSize, 2, HalfSums>(arguments, shared, chunk);
    } else {
        depthwise<T, KernelSize, 1, HalfSums>(arguments, shared, chunk);
    }
}

}  // namespace mnv2::cuda::tile
