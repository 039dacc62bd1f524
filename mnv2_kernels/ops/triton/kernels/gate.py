"""A block with a squeeze-excite: two passes over its pixels, and a gate in between.

    depthwise_sums    x ---expand---> depthwise, kept in memory; sums of a tile's pixels
    excitation        sums ---> means ---squeeze---> ---excite---> gate
    gated_projection  depthwise * gate ---project---> y

An image gives the same bits in any batch: a tile of `depthwise_sums` lies in one image, and the
sums are added in the order of the tiles.
"""

import triton
import triton.language as tl

from .geometry import tiles
from .hidden import bias, depthwise_chunk, dot, matrix, under_patches
from .values import activate, hard_sigmoid, over_sigmoid, summed


@triton.jit(do_not_specialize=["H", "W", "H_out", "W_out", "patch_rows", "patch_columns"])
def depthwise_sums(
    x,
    w_expand,
    b_expand,
    w_dw,
    b_dw,
    kept,
    sums,
    H,
    W,
    H_out,
    W_out,
    patch_rows,
    patch_columns,
    lower_expand,
    upper_expand,
    lower_dw,
    upper_dw,
    C_IN: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    EXPANSION: tl.constexpr,
    B_EXPAND: tl.constexpr,
    B_DW: tl.constexpr,
    CURVE_EXPAND: tl.constexpr,
    CURVE_DW: tl.constexpr,
    SAFE_ROWS: tl.constexpr,
    SAFE_COLUMNS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    PATCHES: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_TILE: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """kept (N, H_out, W_out, C_hidden) and sums (N, tiles, C_hidden) in fp32 of x (N, H, W, C_in).

    As `inverted_residual_patch`, but that the patches of a program are of one image.
    """
    dtype = x.dtype.element_ty
    image_tiles = (patch_rows * patch_columns + PATCHES - 1) // PATCHES
    program = tl.program_id(0)
    image = (program // image_tiles).to(tl.int64)
    patch = program % image_tiles * PATCHES + tl.arange(0, PATCHES)
    exists = patch < patch_rows * patch_columns
    patch_row, patch_column = patch // patch_columns, patch % patch_columns
    under = under_patches(
        x,
        image,
        patch_row,
        patch_column,
        exists,
        H,
        W,
        C_IN,
        KERNEL,
        STRIDE,
        DILATION,
        PAD_TOP,
        PAD_LEFT,
        WHOLE_ROW,
        PATCH_H,
        PATCH_W,
        IN_TILE,
        EXPANSION and KEEP_X,
    )
    for first_hidden in tl.range(0, C_HIDDEN, CHUNK):
        hidden = first_hidden + tl.arange(0, CHUNK)
        exists_hidden = hidden < C_HIDDEN
        depthwise = depthwise_chunk(
            hidden,
            exists_hidden,
            under,
            w_expand,
            b_expand,
            w_dw,
            b_dw,
            (lower_expand, upper_expand, lower_dw, upper_dw),
            C_IN,
            C_HIDDEN,
            KERNEL,
            STRIDE,
            DILATION,
            PAD_TOP,
            PAD_LEFT,
            EXPANSION,
            B_EXPAND,
            B_DW,
            CURVE_EXPAND,
            False,
            False,
            SAFE_ROWS,
            SAFE_COLUMNS,
            WHOLE_ROW,
            PRECISION,
            False,
            PATCHES,
            PATCH_H,
            PATCH_W,
            CHUNK,
            IN_TILE,
            KEEP_X,
        )
        total = tl.full((PATCHES, CHUNK), 0.0, tl.float32)
        for p in tl.static_range(PATCH_H):
            for q in tl.static_range(PATCH_W):
                d = activate(depthwise[p * PATCH_W + q], lower_dw, upper_dw, CURVE_DW)
                row, column = patch_row * PATCH_H + p, patch_column * PATCH_W + q
                inside = (row < H_out) & (column < W_out)
                pixel = (image * H_out + row) * W_out + column
                mask = inside[:, None] & exists_hidden[None, :]
                tl.store(kept + pixel[:, None] * C_HIDDEN + hidden[None, :], d.to(dtype), mask=mask)
                total += tl.where(inside[:, None], d, 0.0)
        place = program.to(tl.int64) * C_HIDDEN + hidden
        tl.store(sums + place, summed(total, 0), mask=exists_hidden)


@triton.jit(do_not_specialize=["image_tiles", "image_pixels"])
def excitation(
    sums,
    w_squeeze,
    b_squeeze,
    w_excite,
    b_excite,
    gate,
    image_tiles,
    image_pixels,
    lower,
    upper,
    C_HIDDEN: tl.constexpr,
    C_SQUEEZED: tl.constexpr,
    B_SQUEEZE: tl.constexpr,
    B_EXCITE: tl.constexpr,
    CURVE: tl.constexpr,
    # 0 a sigmoid, 1 a hard one.
    SCALE: tl.constexpr,
    # A power of two that holds C_HIDDEN.
    HIDDEN: tl.constexpr,
    # Tiles, and squeezed channels, at a time.
    STEP: tl.constexpr,
):
    """gate (N, C_hidden) in fp32 of sums (N, tiles, C_hidden): a program for each image."""
    image = tl.program_id(0).to(tl.int64)
    hidden, steps = tl.arange(0, HIDDEN), tl.arange(0, STEP)
    exists = hidden < C_HIDDEN
    total = tl.full((HIDDEN,), 0.0, tl.float32)
    first = 0
    while first < image_tiles:  # The interpreter has no tl.range of a number that is no constant.
        tile = first + steps
        place = (image * image_tiles + tile)[:, None] * C_HIDDEN + hidden[None, :]
        mask = (tile < image_tiles)[:, None] & exists[None, :]
        total += summed(tl.load(sums + place, mask=mask, other=0.0), 0)
        first += STEP
    mean = total / image_pixels.to(tl.float32)

    z = bias(b_excite, hidden, exists, B_EXCITE)
    for first in tl.range(0, C_SQUEEZED, STEP):
        squeezed = first + steps
        exists_squeezed = squeezed < C_SQUEEZED
        weight = matrix(w_squeeze, hidden, squeezed, C_HIDDEN, C_SQUEEZED).to(tl.float32)
        s = summed(mean[:, None] * weight, 0)
        s = activate(s + bias(b_squeeze, squeezed, exists_squeezed, B_SQUEEZE), lower, upper, CURVE)
        # What does not exist may be infinite, and 0 times that would be NaN.
        s = tl.where(exists_squeezed, s, 0.0)
        weight = matrix(w_excite, squeezed, hidden, C_SQUEEZED, C_HIDDEN).to(tl.float32)
        z += summed(s[:, None] * weight, 0)
    g = over_sigmoid(1.0, z) if SCALE == 0 else hard_sigmoid(z)
    tl.store(gate + image * C_HIDDEN + hidden, g, mask=exists)


@triton.jit(do_not_specialize=["pixels", "image_pixels"])
def gated_projection(
    kept,
    gate,
    w_project,
    b_project,
    x,
    y,
    pixels,
    image_pixels,
    lower,
    upper,
    C_HIDDEN: tl.constexpr,
    C_OUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    B_PROJECT: tl.constexpr,
    CURVE: tl.constexpr,
    # Whether there is a clip or a curve.
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_TILE: tl.constexpr,
):
    """y (N, H_out, W_out, C_out) of kept (N, H_out, W_out, C_hidden) and gate (N, C_hidden)."""
    dtype = x.dtype.element_ty
    OUT_GROUPS: tl.constexpr = tiles(C_OUT, OUT_TILE)
    program = tl.program_id(0)
    pixel = (program // OUT_GROUPS).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    exists = pixel < pixels
    of_image = gate + (pixel // image_pixels * C_HIDDEN)[:, None]
    of_pixel = kept + (pixel * C_HIDDEN)[:, None]
    out = program % OUT_GROUPS * OUT_TILE + tl.arange(0, OUT_TILE)
    exists_out = out < C_OUT
    bias_p = bias(b_project, out, exists_out, B_PROJECT)
    v = tl.broadcast_to(bias_p[None, :], (PIXELS, OUT_TILE))
    for first_hidden in tl.range(0, C_HIDDEN, CHUNK):
        hidden = first_hidden + tl.arange(0, CHUNK)
        mask = exists[:, None] & (hidden < C_HIDDEN)[None, :]
        d = tl.load(of_pixel + hidden[None, :], mask=mask, other=0.0).to(tl.float32)
        d *= tl.load(of_image + hidden[None, :], mask=mask, other=0.0)
        weight = matrix(w_project, hidden, out, C_HIDDEN, C_OUT)
        v = dot(d.to(dtype), weight, v, PRECISION)
    if ACTIVATE:
        v = activate(v, lower, upper, CURVE)
    offsets = pixel[:, None] * C_OUT + out[None, :]
    mask = exists[:, None] & exists_out[None, :]
    if RESIDUAL:
        v += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, v.to(dtype), mask=mask)
