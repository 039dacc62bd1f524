// The depthwise convolution of the tile kernel, from the haloed tile to the operand of the
// projection.
//
// A job is a strip of four outputs in a row. Four lanes have the 16 channels of a slice, so that a
// warp does eight jobs at once.
#pragma once
#include "products.cuh"

namespace mnv2::cuda::tile {

// Two pairs of channels, of weights, pixels and sums; sums in T, or in float.
template <class T, bool HalfSums>
struct Channels;

template <class T>
struct Channels<T, true> {
    Pair v[2];

    MNV2_DEVICE static Channels bias(const float2 (&b)[2]) {
        return {{pack<T>(b[0].x, b[0].y), pack<T>(b[1].x, b[1].y)}};
    }
    MNV2_DEVICE static Channels from(uint2 pairs) { return {{pairs.x, pairs.y}}; }
    MNV2_DEVICE void add(const Channels& a, const Channels& b) {
#pragma unroll
        for (int i = 0; i < 2; i++) v[i] = multiply_add<T>(a.v[i], b.v[i], v[i]);
    }
    // The last product, and the clip.
    template <bool Relu>
    MNV2_DEVICE uint2 finish(const Channels& a, const Channels& b, const PairClip& clip) const {
        Pair pair[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            pair[i] = Relu ? multiply_add_relu<T>(a.v[i], b.v[i], v[i])
                           : maximum<T>(multiply_add<T>(a.v[i], b.v[i], v[i]), clip.lower);
            pair[i] = minimum<T>(pair[i], clip.upper);
        }
        return make_uint2(pair[0], pair[1]);
    }
};

template <class T>
struct Channels<T, false> {
    float2 v[2];

    MNV2_DEVICE static Channels bias(const float2 (&b)[2]) { return {{b[0], b[1]}}; }
    MNV2_DEVICE static Channels from(uint2 pairs) {
        return {{unpack<T>(pairs.x), unpack<T>(pairs.y)}};
    }
    MNV2_DEVICE void add(const Channels& a, const Channels& b) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            v[i].x = fmaf(a.v[i].x, b.v[i].x, v[i].x);
            v[i].y = fmaf(a.v[i].y, b.v[i].y, v[i].y);
        }
    }
    template <bool Relu>
    MNV2_DEVICE uint2 finish(const Channels& a, const Channels& b, const PairClip& clip) const {
        Channels sum = *this;
        sum.add(a, b);
        return make_uint2(clipped<T, Relu>(sum.v[0].x, sum.v[0].y, clip),
                          clipped<T, Relu>(sum.v[1].x, sum.v[1].y, clip));
    }
};

// The taps of a lane's channels: in registers, or, as floats would take too many, read when they
// are needed.
template <class T, int KernelSize, bool HalfSums>
struct Taps {
    SharedAddress low, high;
    uint2 kept[HalfSums ? KernelSize * KernelSize : 1];

    MNV2_DEVICE Taps(SharedAddress low_pair, SharedAddress high_pair)
        : low(low_pair), high(high_pair) {
        if constexpr (HalfSums) {
#pragma unroll
            for (int tap = 0; tap < KernelSize * KernelSize; tap++) kept[tap] = read(tap);
        }
    }
    MNV2_DEVICE uint2 read(int tap) const {
        return make_uint2(load_shared<uint32_t>(low + tap * kTileTapBytes),
                          load_shared<uint32_t>(high + tap * kTileTapBytes));
    }
    MNV2_DEVICE Channels<T, HalfSums> operator[](int tap) const {
        return Channels<T, HalfSums>::from(HalfSums ? kept[HalfSums ? tap : 0] : read(tap));
    }
};

// The channels of one slice, for every output pixel of the tile. Step: pixels that taps read from
// one output of a strip to the next. Spread: pixels of the image from one of these to the next.
template <class T, int KernelSize, int Step, int Spread, bool HalfSums>
MNV2_DEVICE void depthwise(const TileCall& arguments, SharedAddress shared,
                           const ChunkWeights& weights, const float2 (&biases)[2], SharedAddress e,
                           SharedAddress d, int channels, const Share& share) {
    using Sums = Channels<T, HalfSums>;
    constexpr int cols = Step * (kTileStrip - 1) + KernelSize;
    const TilePlan& plan = arguments.plan;
    const int lane = thread_index() % 32, t = lane % 4;
    const LaneChannels at = lane_channels(arguments.call, share.slice);
    const Taps<T, KernelSize, HalfSums> taps(weights.w_dw + at.low * 2, weights.w_dw + at.high * 2);
    const Sums bias = Sums::bias(biases);
    const PairClip clip = arguments.clip_dw;
    const SharedAddress from = e + share.slice * plan.e_slice + t * 8;
    const SharedAddress to = d + share.slice * kTilePixelBytes + t * 8;
#pragma unroll 1
    for (int i = share.part * 8 + lane / 4; i < plan.jobs; i += plan.parts * 8) {
        const uint2 job = load_shared<uint2>(shared + plan.job_table + i * 8);
        SharedAddress address = from + job.x;
        Sums sums[kTileStrip];
#pragma unroll
        for (int s = 0; s < kTileStrip; s++) sums[s] = bias;
#pragma unroll
        for (int row = 0; row < KernelSize; row++) {
            Sums pixels[cols];
#pragma unroll
            for (int c = 0; c < cols; c++)
                pixels[c] = Sums::from(load_shared<uint2>(address + c * Spread * kTilePixelBytes));
            address += Spread * plan.e_row;
            constexpr int last = KernelSize - 1;
#pragma unroll
            for (int tap = 0; tap < (row < last ? KernelSize : last); tap++) {
                const Sums weight = taps[row * KernelSize + tap];
#pragma unroll
                for (int s = 0; s < kTileStrip; s++) sums[s].add(pixels[s * Step + tap], weight);
            }
            if (row < last) continue;

            uint2 result[kTileStrip];
            const Sums weight = taps[KernelSize * KernelSize - 1];
            const auto finish = [&](auto relu) {
#pragma unroll
                for (int s = 0; s < kTileStrip; s++)
                    result[s] = sums[s].template finish<decltype(relu)::value>(
                        pixels[s * Step + last], weight, clip);
            };
            if (arguments.relu) {
                finish(std::true_type{});
            } else {
                finish(std::false_type{});
            }
            // Weights that are zero do not make zeros of infinities.
            if (at.high >= channels) {
#pragma unroll
                for (int s = 0; s < kTileStrip; s++) {
                    result[s].y = 0;
                    if (at.low >= channels) result[s].x = 0;
                }
            }
            const int outputs = static_cast<int>(job.y >> 16);
            SharedAddress output = to + static_cast<int>(job.y & 0xffff) * plan.d_pitch;
#pragma unroll
            for (int s = 0; s < kTileStrip; s++) {
                if (s < outputs) store_shared(output, result[s]);
                output += plan.out_step * plan.d_pitch;
            }
        }
    }
}

// Expansion and depthwise of a chunk: from x to d. Without expansion the pixels of x are in e.
template <class T, int KernelSize, bool HalfSums>
MNV2_DEVICE void hidden_chunk(const TileCall& arguments, SharedAddress shared,
                              const ChunkWeights& weights, const ChunkBiases& biases,
                              SharedAddress e, SharedAddress d, int channels, const Share& share) {
    const Call& call = arguments.call;
    const TilePlan& plan = arguments.plan;
    const bool exists = share.slice * kTileSlice < channels;
    if (call.expansion) {
        if (exists) expand<T>(arguments, shared, weights, biases.expand, share.slice, share.part);
        // Nobody but the warps of a slice reads what they have expanded.
        if (plan.parts == 1) {
            warp_barrier();
        } else {
            block_barrier();
        }
    }
    if (!exists) return;
    if (call.stride > call.dilation) {
        depthwise<T, KernelSize, 2, 1, HalfSums>(arguments, shared, weights, biases.dw, e, d,
                                                 channels, share);
    } else if (call.dilation == 1) {
        depthwise<T, KernelSize, 1, 1, HalfSums>(arguments, shared, weights, biases.dw, e, d,
                                                 channels, share);
    } else {
        depthwise<T, KernelSize, 1, 2, HalfSums>(arguments, shared, weights, biases.dw, e, d,
                                                 channels, share);
    }
}

}  // namespace mnv2::cuda::tile
