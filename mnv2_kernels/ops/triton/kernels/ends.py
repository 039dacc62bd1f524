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
    # Whether numbers of pixels, or places in an image, want 64 bits.
    WIDE: tl.constexpr,
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
    index_type: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    pixel = (program // OUT_GROUPS).to(index_type) * PIXELS + tl.arange(0, PIXELS)
    exists = pixel < pixels
    out = program % OUT_GROUPS * OUT_TILE + tl.arange(0, OUT_TILE)
    exists_out = out < C_OUT
    line = pixel // W_out
    row0 = (line % H_out).to(tl.int32) * 2 - PAD_TOP
    column0 = (pixel % W_out).to(tl.int32) * 2 - PAD_LEFT
    # A bit for each place of the window that lies inside the image.
    inside = tl.full((PIXELS,), 0, tl.int32)
    for j in tl.static_range(3):
        for i in tl.static_range(3):
            rows = (row0 + i >= 0) & (row0 + i < H)
            columns = (column0 + j >= 0) & (column0 + j < W)
            inside += (exists & rows & columns).to(tl.int32) << (3 * j + i)
    of_pixel = x + (line // H_out).to(tl.int64) * stride_n
    of_pixel += row0.to(index_type) * stride_h + column0.to(index_type) * stride_w
    v = tl.broadcast_to(bias(b, out, exists_out, True)[None, :], (PIXELS, OUT_TILE))
    for first in tl.range(0, 9 * C_IN, TERMS):
        term = first + tl.arange(0, TERMS)
        channel, place = (term % C_IN).to(index_type), (term // C_IN).to(index_type)
        offsets = place % 3 * stride_h + place // 3 * stride_w + channel * stride_c
        # There is no bit for terms that do not exist.
        mask = (inside[:, None] & (1 << (term // C_IN))[None, :]) != 0
        values = tl.load(of_pixel[:, None] + offsets[None, :], mask=mask, other=0.0)
        v = dot(values, matrix(weight, term, out, 9 * C_IN, C_OUT), v, PRECISION)
    v = activate(v, lower, upper, CURVE)
    mask = exists[:, None] & exists_out[None, :]
    of_y = y + pixel[:, None].to(tl.int64) * C_OUT
    tl.store(of_y + out[None, :], v.to(y.dtype.element_ty), mask=mask)


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
