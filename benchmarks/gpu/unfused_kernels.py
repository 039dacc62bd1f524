"""The two kernels of the block in three launches: 1x1 convolution (twice) and depthwise, NHWC.

Each stage's bias, clip and residual are in its epilogue: what can be done without fusing stages.
Channel counts come as multiples of a unit, so that the compiler knows how far rows are aligned, and
one compiled kernel serves many of them. Sums are fp32, pixel indices 64-bit.
"""

import triton
import triton.language as tl

# The interpreter knows no products of bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def tap(row, output, across, kernel, stride, dilation):
    """The tap through which output row `output` of a tile reads input row `row`; -1 for none."""
    offset = row - output * stride
    if offset % dilation or not 0 <= offset // dilation < kernel:
        return -1
    return offset // dilation * kernel + across


@triton.constexpr_function
def rows_under(rows, kernel, stride, dilation):
    """Input rows under `rows` output rows."""
    return (rows - 1) * stride + dilation * (kernel - 1) + 1


@triton.jit
def _clip(v, lower, upper):
    """NaN stays NaN, as in PyTorch."""
    v = tl.maximum(v, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pointwise(
    x,
    w,
    bias,
    shortcut,
    y,
    pixels,
    in_units,
    out_units,
    lower,
    upper,
    IN_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    # C_in for the interpreter, whose loops end at plain numbers only.
    LOOP_END: tl.constexpr = None,
):
    """y (pixels, C_out) = clip(x (pixels, C_in) w (C_in, C_out) + bias) + shortcut."""
    c_in, c_out = in_units * IN_UNIT, out_units * OUT_UNIT
    out_tiles = (c_out + OUT_TILE - 1) // OUT_TILE
    program = tl.program_id(0)
    # Tiles of one pixel tile run side by side and find x in L2.
    pixel = (program // out_tiles).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    out = program % out_tiles * OUT_TILE + tl.arange(0, OUT_TILE)
    lanes = tl.arange(0, IN_TILE)
    exists, exists_out = pixel < pixels, out < c_out
    x_tile = x + pixel[:, None] * c_in + lanes[None, :]
    w_tile = w + lanes[:, None] * c_out + out[None, :]
    sums = tl.full((PIXELS, OUT_TILE), 0.0, tl.float32)
    for first in tl.range(0, c_in if LOOP_END is None else LOOP_END, IN_TILE):
        inside = first + lanes < c_in
        a = tl.load(x_tile + first, mask=exists[:, None] & inside[None, :], other=0.0)
        b = tl.load(w_tile + first * c_out, mask=inside[:, None] & exists_out[None, :], other=0.0)
        if INTERPRETED:
            sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(a, b, sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + out, mask=exists_out, other=0.0).to(tl.float32)[None, :]
    sums = _clip(sums, lower, upper)
    offsets = pixel[:, None] * c_out + out[None, :]
    mask = exists[:, None] & exists_out[None, :]
    if RESIDUAL:
        sums += tl.load(shortcut + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def depthwise(
    x,
    w,
    bias,
    y,
    H,
    W,
    H_out,
    W_out,
    units,
    lower,
    upper,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y (N, H_out, W_out, C) of x (N, H, W, C): a program takes ROWS x COLUMNS x CHANNELS of it.

    Every row of x under the tile is loaded once for each tap across, for all the rows of y.
    """
    channels = units * UNIT
    channel_tiles = (channels + CHANNELS - 1) // CHANNELS
    column_tiles = (W_out + COLUMNS - 1) // COLUMNS
    row_tiles = (H_out + ROWS - 1) // ROWS
    program = tl.program_id(0)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    program = program // channel_tiles
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    program = program // column_tiles
    first_row = program % row_tiles * ROWS
    image = (program // row_tiles).to(tl.int64)
    exists = channel < channels

    if BIAS:
        start = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    else:
        start = tl.full((CHANNELS,), 0.0, tl.float32)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.broadcast_to(start[None, :], (COLUMNS, CHANNELS)),)
    taps = ()
    for k in tl.static_range(KERNEL * KERNEL):
        weight = tl.load(w + k * channels + channel, mask=exists, other=0.0).to(tl.float32)
        taps = taps + (tl.broadcast_to(weight[None, :], (COLUMNS, CHANNELS)),)

    for i in tl.static_range(rows_under(ROWS, KERNEL, STRIDE, DILATION)):
        row = first_row * STRIDE - PAD_TOP + i
        # Triton 3.9 interprets a scalar condition spread over a tile as int32, which no mask is.
        columns = tl.where((row >= 0) & (row < H), W, 0)
        for across in tl.static_range(KERNEL):
            from_column = column * STRIDE - PAD_LEFT + across * DILATION
            inside = (from_column >= 0) & (from_column < columns)
            pixel = (image * H + row) * W + from_column
            mask = inside[:, None] & exists[None, :]
            v = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            v = v.to(tl.float32)
            updated = ()
            for p in tl.static_range(ROWS):
                total = sums[p]
                if tap(i, p, across, KERNEL, STRIDE, DILATION) >= 0:
                    weight = taps[tap(i, p, across, KERNEL, STRIDE, DILATION)]
                    total = tl.fma(v, weight, total)
                updated = updated + (total,)
            sums = updated

    for p in tl.static_range(ROWS):
        row_out = first_row + p
        pixel_out = (image * H_out + row_out) * W_out + column
        inside_out = column < tl.where(row_out < H_out, W_out, 0)
        mask_out = inside_out[:, None] & exists[None, :]
        result = _clip(sums[p], lower, upper).to(y.dtype.element_ty)
        tl.store(y + pixel_out[:, None] * channels + channel[None, :], result, mask=mask_out)
