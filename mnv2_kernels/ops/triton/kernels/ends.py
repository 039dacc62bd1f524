"""The ends of a network: its first convolution, and its last one with the mean over all pixels."""

import triton
import triton.language as tl

from .geometry import tiles
from .hidden import bias, dot, matrix
from .values import activate, summed


@triton.jit(
    do_not_specialize=[
        *("pixels", "H", "W", "H_out", "W_out"),
        *("stride_n", "stride_c", "stride_h", "stride_w"),
    ]
)
def stem(
    x,
    weight,
    b,
    y,
    pixels,
    H,
    W,
    H_out,
    W_out,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    lower,
    upper,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    CURVE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    # Terms of a sum at a time: weights of a channel of x in a place of the window.
    TERMS: tl.constexpr,
    OUT_TILE: tl.constexpr,
):
    """y (N, H_out, W_out, C_out) of x (N, C_in, H, W) in any layout: 3x3, stride 2, clip or curve.

    weight (3, 3, C_in, C_out), the columns of the window first.
    """
    OUT_GROUPS: tl.constexpr = tiles(C_OUT, OUT_TILE)
    program = tl.program_id(0)
    pixel = (program // OUT_GROUPS).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    exists = pixel < pixels
    out = program % OUT_GROUPS * OUT_TILE + tl.arange(0, OUT_TILE)
    exists_out = out < C_OUT
    line = pixel // W_out
    row0 = (line % H_out).to(tl.int32) * 2 - PAD_TOP
    column0 = (pixel % W_out).to(tl.int32) * 2 - PAD_LEFT
    of_image = line // H_out * stride_n
    v = tl.broadcast_to(bias(b, out, exists_out, True)[None, :], (PIXELS, OUT_TILE))
    for first in tl.range(0, 9 * C_IN, TERMS):
        term = first + tl.arange(0, TERMS)
        channel, place = term % C_IN, term // C_IN
        row = row0[:, None] + (place % 3)[None, :]
        column = column0[:, None] + (place // 3)[None, :]
        inside = exists[:, None] & (term < 9 * C_IN)[None, :]
        inside = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        offsets = of_image[:, None] + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
        offsets += (channel.to(tl.int64) * stride_c)[None, :]
        values = tl.load(x + offsets, mask=inside, other=0.0)
        v = dot(values, matrix(weight, term, out, 9 * C_IN, C_OUT), v, PRECISION)
    v = activate(v, lower, upper, CURVE)
    mask = exists[:, None] & exists_out[None, :]
    tl.store(y + pixel[:, None] * C_OUT + out[None, :], v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["image_pixels"])
def pooled(
    x,
    weight,
    b,
    y,
    image_pixels,
    lower,
    upper,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    CURVE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_TILE: tl.constexpr,
):
    """y (N, C_out) of x (N, H, W, C_in): 1x1, a clip or a curve, the mean over all pixels.

    weight (C_in, C_out). A program has one image, which gives the same bits in any batch.
    """
    OUT_GROUPS: tl.constexpr = tiles(C_OUT, OUT_TILE)
    program = tl.program_id(0)
    image = (program // OUT_GROUPS).to(tl.int64)
    out = program % OUT_GROUPS * OUT_TILE + tl.arange(0, OUT_TILE)
    exists_out = out < C_OUT
    start = tl.broadcast_to(bias(b, out, exists_out, True)[None, :], (PIXELS, OUT_TILE))
    total = tl.full((OUT_TILE,), 0.0, tl.float32)
    first = 0
    while first < image_pixels:  # The interpreter has no tl.range of a number that is no constant.
        pixel = first + tl.arange(0, PIXELS)
        exists = pixel < image_pixels
        of_pixel = x + (image * image_pixels + pixel)[:, None] * C_IN
        v = start
        for first_in in tl.range(0, C_IN, CHUNK):
            channels = first_in + tl.arange(0, CHUNK)
            mask = exists[:, None] & (channels < C_IN)[None, :]
            values = tl.load(of_pixel + channels[None, :], mask=mask, other=0.0)
            v = dot(values, matrix(weight, channels, out, C_IN, C_OUT), v, PRECISION)
        v = activate(v, lower, upper, CURVE)
        total += summed(tl.where(exists[:, None], v, 0.0), 0)
        first += PIXELS
    mean = total / image_pixels.to(tl.float32)
    tl.store(y + image * C_OUT + out, mean.to(y.dtype.element_ty), mask=exists_out)
