// The generic kernel: every block that the op's contract allows, in float and without tensor cores.
//
// A block of threads computes a tile of the output, or some channels of it. It expands the pixels
// under the tile for 32 hidden channels at a time, in shared memory, which the depthwise
// convolution reads there; its result goes back to shared memory and from there into the sums of
// the projection, which stay in registers. All products are of floats and in one order: k
// ascending.
#include "../kernels.h"
#include "../launch.h"
#include "../ptx.h"
#include "plan.h"
#include "stage.cuh"

namespace mnv2::cuda {

namespace generic {

// sums += a b for one thread: row i of a is at rows[i], and row k of b, of 4 channels, at
// b + k * b_pitch. `terms` is a multiple of 4.
template <int Rows>
MNV2_DEVICE void add_product(float (&sums)[Rows][4], const SharedAddress (&rows)[Rows],
                             SharedAddress b, int b_pitch, int terms) {
#pragma unroll 1
    for (int k = 0; k < terms; k += 4) {
        float4 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = load_shared<float4>(b + (k + i) * b_pitch);
#pragma unroll
        for (int row = 0; row < Rows; row++) {
            const float4 a = load_shared<float4>(rows[row] + k * 4);
            const float values[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[row][0] = fmaf(values[i], w[i].x, sums[row][0]);
                sums[row][1] = fmaf(values[i], w[i].y, sums[row][1]);
                sums[row][2] = fmaf(values[i], w[i].z, sums[row][2]);
                sums[row][3] = fmaf(values[i], w[i].w, sums[row][3]);
            }
        }
    }
}

// Expands pixels first to first + 32 Rows - 1 of those under the tile.
template <class T, int Rows>
MNV2_DEVICE void expand(const Call& call, const GenericTile& tile, const TileContext& c, int first,
                        int64_t hidden) {
    const SharedAddress table = c.shared + tile.pixels, w_expand = c.shared + tile.w_expand;
    const int channel = thread_index() % kGenericChunkThreads * kGenericCols;
    int pixels[Rows];
    SharedAddress rows[Rows];
#pragma unroll
    for (int i = 0; i < Rows; i++) {
        pixels[i] = first + thread_index() / kGenericChunkThreads + i * kGenericPixelThreads;
        const int there = min(pixels[i], tile.halo_pixels - 1) - (tile.keeps_x ? 0 : first);
        rows[i] = c.shared + tile.x + there * tile.x_pitch * 4;
    }
    float sums[Rows][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < tile.slices; slice++) {
        const int64_t begin = static_cast<int64_t>(slice) * tile.slice;
        const int64_t left = (call.in_channels - begin + 3) / 4 * 4;
        const int terms = static_cast<int>(min(left, static_cast<int64_t>(tile.slice)));
        if (first == 0 || tile.slices > 1 || !tile.keeps_x) {
            block_barrier();  // The slice before this one has been read.
            stage_weight<T, kGenericChunk>(call.w_expand, begin, terms, call.in_channels, hidden,
                                           call.hidden_channels, w_expand);
            if (!tile.keeps_x)
                stage_pixels<T>(call, c.position, table, first,
                                min(kGenericPass, tile.halo_pixels - first), begin, terms,
                                c.shared + tile.x, tile.x_pitch);
            block_barrier();
        }
        add_product<Rows>(sums, rows, w_expand + channel * 4, kGenericChunk * 4, terms);
        if (tile.keeps_x) {
#pragma unroll
            for (int i = 0; i < Rows; i++) rows[i] += terms * 4;
        }
    }
    const int taps = static_cast<int>(call.kernel_size * call.kernel_size);
    const float4 bias =
        load_shared<float4>(c.shared + tile.taps + ((taps + 1) * kGenericChunk + channel) * 4);
#pragma unroll
    for (int i = 0; i < Rows; i++) {
        if (pixels[i] >= tile.halo_pixels) continue;
        float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
        if (load_shared<uint32_t>(table + pixels[i] * 4) != kOutside)
            value = make_float4(clip(sums[i][0] + bias.x, call.clip_expand),
                                clip(sums[i][1] + bias.y, call.clip_expand),
                                clip(sums[i][2] + bias.z, call.clip_expand),
                                clip(sums[i][3] + bias.w, call.clip_expand));
        store_shared<float4>(c.shared + tile.expanded + (pixels[i] * kGenericChunk + channel) * 4,
                             value);
    }
}

// The depthwise convolution of a chunk: every thread computes four channels of a few pixels.
template <class Sizes>
MNV2_DEVICE void convolve(const Call& call, const GenericTile& tile, const TileContext& c,
                          int64_t hidden) {
    constexpr int kRows = Sizes::kDepthwiseRows;
    const int kernel_size = static_cast<int>(call.kernel_size),
              dilation = static_cast<int>(call.dilation);
    const int channel = thread_index() % kGenericChunkThreads * kGenericCols;
    const int first = thread_index() / kGenericChunkThreads;
    const SharedAddress taps = c.shared + tile.taps + channel * 4;
    const float4 bias = load_shared<float4>(taps + kernel_size * kernel_size * kGenericChunk * 4);
    SharedAddress from[kRows];
    float4 sums[kRows];
#pragma unroll
    for (int i = 0; i < kRows; i++) {
        // Pixels that the tile does not have read those of the last one.
        const int pixel = min(first + i * kGenericPixelThreads, tile.rows * tile.cols - 1);
        const int row = pixel / tile.cols * static_cast<int>(call.stride);
        const int col = pixel % tile.cols * static_cast<int>(call.stride);
        from[i] =
            c.shared + tile.expanded + ((row * tile.halo_cols + col) * kGenericChunk + channel) * 4;
        sums[i] = bias;
    }
#pragma unroll 1
    for (int row = 0; row < kernel_size; row++) {
#pragma unroll 1
        for (int col = 0; col < kernel_size; col++) {
            const float4 w =
                load_shared<float4>(taps + (row * kernel_size + col) * kGenericChunk * 4);
            const int step = dilation * (row * tile.halo_cols + col) * kGenericChunk * 4;
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                const float4 value = load_shared<float4>(from[i] + step);
                sums[i].x = fmaf(value.x, w.x, sums[i].x);
                sums[i].y = fmaf(value.y, w.y, sums[i].y);
                sums[i].z = fmaf(value.z, w.z, sums[i].z);
                sums[i].w = fmaf(value.w, w.w, sums[i].w);
            }
        }
    }
    // Channels that the block does not have add nothing, whatever the clip makes of them.
    const int64_t left = call.hidden_channels - hidden - channel;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
        const float4 value = make_float4(left > 0 ? clip(sums[i].x, call.clip_dw) : 0.f,
                                         left > 1 ? clip(sums[i].y, call.clip_dw) : 0.f,
                                         left > 2 ? clip(sums[i].z, call.clip_dw) : 0.f,
                                         left > 3 ? clip(sums[i].w, call.clip_dw) : 0.f);
        const int pixel = first + i * kGenericPixelThreads;
        store_shared<float4>(
            c.shared + tile.depthwise + (pixel * kGenericDepthwisePitch + channel) * 4, value);
    }
}

// Output pixels and the first channel of each group that a thread has sums of.
template <class Sizes>
MNV2_DEVICE int output_pixel(int i) {
    return thread_index() / Sizes::kOutThreads + i * Sizes::kPixelThreads;
}
template <class Sizes>
MNV2_DEVICE int output_channel() {
    return thread_index() % Sizes::kOutThreads * kGenericCols;
}

template <class T, class Sizes>
MNV2_DEVICE void project(const Call& call, const GenericTile& tile, const TileContext& c,
                         int64_t hidden, int64_t first_channel,
                         float (&sums)[Sizes::kOutGroups][kGenericRows][4]) {
    const SharedAddress w_project = c.shared + tile.w_project;
    const int64_t left = (call.hidden_channels - hidden + 3) / 4 * 4;
    const int terms = static_cast<int>(min(left, static_cast<int64_t>(kGenericChunk)));
    SharedAddress rows[kGenericRows];
#pragma unroll
    for (int i = 0; i < kGenericRows; i++)
        rows[i] = c.shared + tile.depthwise + output_pixel<Sizes>(i) * kGenericDepthwisePitch * 4;
#pragma unroll
    for (int group = 0; group < Sizes::kOutGroups; group++) {
        if (group * Sizes::kGroupChannels >= tile.out_channels) break;
        stage_weight<T, Sizes::kGroupChannels>(call.w_project, hidden, terms, call.hidden_channels,
                                               first_channel + group * Sizes::kGroupChannels,
                                               call.out_channels, w_project);
        block_barrier();
        add_product<kGenericRows>(sums[group], rows, w_project + output_channel<Sizes>() * 4,
                                  Sizes::kGroupChannels * 4, terms);
        block_barrier();
    }
}

template <class T, class Sizes>
MNV2_DEVICE void store_tile(const Call& call, const GenericTile& tile, int64_t image,
                            int64_t first_row, int64_t first_col, int64_t first_channel,
                            const float (&sums)[Sizes::kOutGroups][kGenericRows][4]) {
    const int64_t end_channel = min(first_channel + tile.out_channels, call.out_channels);
#pragma unroll
    for (int i = 0; i < kGenericRows; i++) {
        const int pixel = output_pixel<Sizes>(i);
        const int64_t row = first_row + pixel / tile.cols, col = first_col + pixel % tile.cols;
        if (pixel >= tile.rows * tile.cols || row >= call.H_out || col >= call.W_out) continue;
        const int64_t to = ((image * call.H_out + row) * call.W_out + col) * call.out_channels;
#pragma unroll
        for (int j = 0; j < Sizes::kOutGroups * kGenericCols; j++) {
            const int group = j / kGenericCols;
            const int64_t channel = first_channel + group * Sizes::kGroupChannels +
                                    output_channel<Sizes>() + j % kGenericCols;
            if (channel >= end_channel) continue;
            const float bias = bias_or_zero(call.b_project, channel, call.out_channels);
            float value = clip(sums[group][i][j % kGenericCols] + bias, call.clip_project);
            // x has the shape of y.
            if (call.residual) value += load_element<T>(call.x, to + channel);
            store_element<T>(call.y, to + channel, value);
        }
    }
}

template <class T, class Sizes>
__global__ void __launch_bounds__(kGenericThreads, 2)
    inverted_residual_generic(const __grid_constant__ GenericCall arguments) {
    const Call& call = arguments.call;
    const GenericTile& tile = arguments.tile;
    const SharedAddress shared = shared_memory();

    for (int64_t item = block_index(); item < arguments.items; item += grid_blocks()) {
        const int64_t first_channel = item % tile.out_blocks * tile.out_channels;
        const int64_t tiles = item / tile.out_blocks;
        const int64_t first_col = tiles % tile.tile_cols * tile.cols;
        const int64_t first_row = tiles / tile.tile_cols % tile.tile_rows * tile.rows;
        const int64_t image = tiles / tile.tile_cols / tile.tile_rows;
        const TileContext c{shared,
                            {image, first_row * call.stride - call.pad_top,
                             first_col * call.stride - call.pad_left}};
        stage_pixel_table(call, tile, c.position, shared + tile.pixels);
        block_barrier();
        if (tile.keeps_x)
            stage_pixels<T>(call, c.position, shared + tile.pixels, 0, tile.halo_pixels, 0,
                            static_cast<int>((call.in_channels + 3) / 4 * 4), shared + tile.x,
                            tile.x_pitch);

        float sums[Sizes::kOutGroups][kGenericRows][4] = {};
        for (int64_t hidden = 0; hidden < call.hidden_channels; hidden += kGenericChunk) {
            stage_taps<T>(call, hidden, shared + tile.taps);
            if (!call.expansion) {
                stage_pixels<T>(call, c.position, shared + tile.pixels, 0, tile.halo_pixels, hidden,
                                kGenericChunk, shared + tile.expanded, kGenericChunk);
            } else {
                int first = 0;
                for (; tile.halo_pixels - first > kGenericPass / 2; first += kGenericPass)
                    expand<T, kGenericRows>(call, tile, c, first, hidden);
                if (first < tile.halo_pixels)
                    expand<T, kGenericRows / 2>(call, tile, c, first, hidden);
            }
            block_barrier();
            convolve<Sizes>(call, tile, c, hidden);
            project<T, Sizes>(call, tile, c, hidden, first_channel, sums);
        }
        store_tile<T, Sizes>(call, tile, image, first_row, first_col, first_channel, sums);
    }
}

template <class T, class Sizes>
cudaError_t run_sizes(const Call& call, const Device& device, cudaStream_t stream) {
    GenericCall arguments{call, best_generic_tile<Sizes>(call), 0};
    const GenericTile& tile = arguments.tile;
    arguments.items = call.N * tile.tile_rows * tile.tile_cols * tile.out_blocks;
    // Many more blocks than run at a time, so that none of them comes late.
    const Grid grid{std::min<int64_t>(arguments.items, device.multiprocessors * int64_t{32}),
                    kGenericThreads, tile.end};
    return launch(inverted_residual_generic<T, Sizes>, grid, device, stream, arguments);
}

template <class T>
cudaError_t run_element(const Call& call, const Device& device, cudaStream_t stream) {
    if (call.out_channels <= GenericNarrow::kGroupChannels)
        return run_sizes<T, GenericNarrow>(call, device, stream);
    return run_sizes<T, GenericWide>(call, device, stream);
}

}  // namespace generic

cudaError_t run_generic(const Call& call, const Device& device, cudaStream_t stream) {
    switch (call.element) {
        case Element::half:
            return generic::run_element<__half>(call, device, stream);
        case Element::bfloat16:
            return generic::run_element<__nv_bfloat16>(call, device, stream);
        case Element::single:
            return generic::run_element<float>(call, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace mnv2::cuda
