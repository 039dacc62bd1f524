"""Hidden channels of patches, a chunk at a time: what the kernels of patch.py and gate.py share.

How patches, slots and chunks make matrices is said in patch.py.
"""

import triton
import triton.language as tl

from .geometry import is_read, slots, tap, tiles
from .values import INTERPRETED, activate, clip_half, keep_half, last_tap_half


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def bias(pointer, channels, valid, PRESENT: tl.constexpr):
    """fp32 biases of these channels, 0 where there are none."""
    if PRESENT:
        return tl.load(pointer + channels, mask=valid, other=0.0).to(tl.float32)
    return tl.full(channels.shape, 0.0, tl.float32)


@triton.jit
def matrix(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """These rows and columns of a contiguous ROWS x COLUMNS matrix, 0 beyond its edges."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def pixels(pointers, inside, channels, C_IN: tl.constexpr):
    """These channels of one slot of every patch, 0 where it lies outside the image."""
    mask = (inside != 0)[:, None] & (channels < C_IN)[None, :]
    return tl.load(pointers + channels[None, :], mask=mask, other=0.0)


@triton.jit
def expand_from_memory(
    pointers,
    inside,
    w_expand,
    hidden,
    bias,
    C_IN: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    IN_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The expansion of one slot before its clip, for more input channels than can be kept."""
    e = bias
    for first_in in tl.range(0, C_IN, IN_TILE):
        channels = first_in + tl.arange(0, IN_TILE)
        slot = pixels(pointers, inside, channels, C_IN)
        e = dot(slot, matrix(w_expand, channels, hidden, C_IN, C_HIDDEN), e, PRECISION)
    return e


@triton.jit
def pad(
    e,
    row_mask,
    column_mask,
    ROW_SAFE: tl.constexpr,
    COLUMN_SAFE: tl.constexpr,
    HALF: tl.constexpr,
):
    """Zero padding belongs to the clipped expansion: 0 where the slot lies outside the image."""
    if not (ROW_SAFE and COLUMN_SAFE):
        rows = column_mask if ROW_SAFE else row_mask
        columns = row_mask if COLUMN_SAFE else column_mask
        if HALF:
            e = keep_half(e, rows[:, None], columns[:, None])
        else:
            e = tl.where((rows & columns)[:, None] != 0, e, 0.0)
    return e


@triton.jit
def under_patches(
    x,
    image,
    patch_row,
    patch_column,
    exists,
    H,
    W,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    IN_TILE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """What `depthwise_chunk` needs of x: addresses of slot (0, 0) of every patch, the step to the
    row below, masks of slot rows and of columns, and, if KEPT, all of x, some matrices a slot.
    """
    SLOT_ROWS: tl.constexpr = slots(PATCH_H, KERNEL, STRIDE, DILATION)
    SLOT_COLUMNS: tl.constexpr = slots(PATCH_W, KERNEL, STRIDE, DILATION)
    row0 = patch_row * (PATCH_H * STRIDE) - PAD_TOP
    column0 = patch_column * (PATCH_W * STRIDE) - PAD_LEFT
    # Masks are -1 inside the image and 0 outside, so that an `and` applies them.
    row_masks = ()
    for i in tl.static_range(SLOT_ROWS):
        row_masks = row_masks + (-(exists & (row0 + i >= 0) & (row0 + i < H)).to(tl.int32),)
    column_masks = ()
    for j in tl.static_range(SLOT_COLUMNS):
        column_masks = column_masks + (-((column0 + j >= 0) & (column0 + j < W)).to(tl.int32),)

    row_step = tl.full((), W, tl.int64) * C_IN
    # Inside the image or not.
    first_slot = (x + ((image * H + row0) * W + column0) * C_IN)[:, None]
    in_lanes = tl.arange(0, IN_TILE)
    kept = ()
    if KEPT:
        for i in tl.static_range(SLOT_ROWS):
            for j in tl.static_range(SLOT_COLUMNS):
                for k in tl.static_range(tiles(C_IN, IN_TILE)):
                    inside = row_masks[i] & column_masks[j]
                    pointers = first_slot + (i * row_step + j * C_IN)
                    if is_read(j, PATCH_W, KERNEL, STRIDE, DILATION, PAD_LEFT, WHOLE_ROW):
                        slot = pixels(pointers, inside, k * IN_TILE + in_lanes, C_IN)
                        kept = kept + (slot,)
                    else:
                        kept = kept + (in_lanes,)  # Never used: later ones keep their places.
    return first_slot, row_step, row_masks, column_masks, kept


@triton.jit
def depthwise_chunk(
    hidden,
    exists_hidden,
    under,
    w_expand,
    b_expand,
    w_dw,
    b_dw,
    bounds,
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
    ZERO_EXPAND: tl.constexpr,
    ZERO_DW: tl.constexpr,
    SAFE_ROWS: tl.constexpr,
    SAFE_COLUMNS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
    PATCHES: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_TILE: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """The depthwise result of these hidden channels, a matrix for each output of a patch.

    `under` is what `under_patches` gives, `bounds` are lower and upper of the clips after expansion
    and depthwise. What follows the depthwise is left to the caller, but for the last tap's clip of
    fp16.
    """
    SLOT_ROWS: tl.constexpr = slots(PATCH_H, KERNEL, STRIDE, DILATION)
    SLOT_COLUMNS: tl.constexpr = slots(PATCH_W, KERNEL, STRIDE, DILATION)
    IN_TILES: tl.constexpr = tiles(C_IN, IN_TILE)
    LAST_TAP: tl.constexpr = KERNEL * KERNEL - 1
    hidden_type: tl.constexpr = tl.float16 if HALF else tl.float32
    first_slot, row_step, row_masks, column_masks, kept = under
    lower_e, upper_e, lower_d, upper_d = bounds
    in_lanes = tl.arange(0, IN_TILE)
    expand_tiles = ()
    if EXPANSION:
        bias_e = bias(b_expand, hidden, exists_hidden, B_EXPAND)
        bias_e = tl.broadcast_to(bias_e[None, :], (PATCHES, CHUNK))
        if KEEP_X:
            for k in tl.static_range(IN_TILES):
                tile = matrix(w_expand, k * IN_TILE + in_lanes, hidden, C_IN, C_HIDDEN)
                expand_tiles = expand_tiles + (tile,)
    taps = ()
    for k in tl.static_range(KERNEL * KERNEL):
        weight = tl.load(w_dw + k * C_HIDDEN + hidden, mask=exists_hidden, other=0.0)
        taps = taps + (weight.to(hidden_type)[None, :],)
    bias_d = bias(b_dw, hidden, exists_hidden, B_DW).to(hidden_type)
    depthwise = ()
    for _ in tl.static_range(PATCH_H * PATCH_W):
        depthwise = depthwise + (tl.broadcast_to(bias_d[None, :], (PATCHES, CHUNK)),)

    for i in tl.static_range(SLOT_ROWS):
        for j in tl.static_range(SLOT_COLUMNS):
            if is_read(i, PATCH_H, KERNEL, STRIDE, DILATION) and is_read(
                j, PATCH_W, KERNEL, STRIDE, DILATION, PAD_LEFT, WHOLE_ROW
            ):
                inside = row_masks[i] & column_masks[j]
                offset = i * row_step + j * C_IN
                if EXPANSION:
                    if KEEP_X:
                        e = bias_e
                        for k in tl.static_range(IN_TILES):
                            slot = kept[(i * SLOT_COLUMNS + j) * IN_TILES + k]
                            e = dot(slot, expand_tiles[k], e, PRECISION)
                    else:
                        e = expand_from_memory(
                            first_slot + offset,
                            inside,
                            w_expand,
                            hidden,
                            bias_e,
                            C_IN,
                            C_HIDDEN,
                            IN_TILE,
                            PRECISION,
                        )
                    if HALF:
                        e = clip_half(e, lower_e, upper_e, ZERO_EXPAND)
                    else:
                        e = activate(e, lower_e, upper_e, CURVE_EXPAND)
                    e = pad(
                        e,
                        row_masks[i],
                        column_masks[j],
                        i >= PAD_TOP and i < SAFE_ROWS,
                        j >= PAD_LEFT and j < SAFE_COLUMNS,
                        HALF,
                    )
                else:
                    e = pixels(first_slot + offset, inside, hidden, C_IN).to(hidden_type)

                updated = ()
                for p in tl.static_range(PATCH_H):
                    for q in tl.static_range(PATCH_W):
                        d = depthwise[p * PATCH_W + q]
                        if tap(i, j, p, q, KERNEL, STRIDE, DILATION) >= 0:
                            w = taps[tap(i, j, p, q, KERNEL, STRIDE, DILATION)]
                            if HALF and tap(i, j, p, q, KERNEL, STRIDE, DILATION) == LAST_TAP:
                                d = last_tap_half(d, e, w, lower_d, upper_d, ZERO_DW)
                            else:
                                d = tl.fma(e, w, d)
                        updated = updated + (d,)
                depthwise = updated
    return depthwise
