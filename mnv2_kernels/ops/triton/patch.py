"""The block as one Triton kernel in which every row of a tile is one patch of the output.

A program owns PATCHES patches of PATCH_H x PATCH_W output pixels. The pixels of x under a patch and
its halo are its slots; slot (i, j) of all patches together is one matrix, PATCHES x C_in, so that

    expansion    one matrix product a slot and chunk of hidden channels,
    depthwise    plain arithmetic between matrices of one shape, PATCHES x CHUNK,
    projection   one matrix product an output pixel, summed over the chunks in registers

need no expanded tensor in memory of any kind: its values stay in registers. The halo's expansion is
computed again by each neighbour. Addresses in x and y are 64-bit; the grid has one dimension.

Hidden values are fp32, or fp16 with HALF, where two share a register and an instruction.
"""

import triton
import triton.language as tl

from .geometry import ends_beyond, is_read, slots, tap, tiles

# The interpreter knows neither PTX nor products of bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _clip(v, lower, upper):
    """NaN stays NaN, as in PyTorch."""
    v = tl.maximum(v, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clip_half(v, lower, upper, ZERO: tl.constexpr):
    """fp32 -> clipped fp16; ZERO where lower is 0. Three (two) instructions for two values."""
    if INTERPRETED:
        v = _clip(v.to(tl.float16), lower, upper)
    elif ZERO:
        v = tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1; min.NaN.f16x2 $0, $0, $3;",
            "=&r,r,r,r",
            [v, upper],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        v = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1; max.NaN.f16x2 $0, $0, $3; min.NaN.f16x2 $0, $0, $4;",
            "=&r,r,r,r,r",
            [v, lower, upper],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return v


@triton.jit
def _keep_half(v, rows, columns):
    """v where both masks are -1, +0 where one of them is 0: a single three-way `and`.

    Two neighbours share a register, and the mask of the first: they are channels of one patch in
    the layout that products have, and in every other with two or more channels a thread.
    """
    if INTERPRETED:
        v = tl.where((rows & columns) != 0, v, 0.0)
    else:
        v = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2; and.b32 $0, $0, $4;",
            "=&r,r,r,r,r,r",
            [v, rows, columns],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return v


@triton.jit
def _last_tap_half(d, e, w, lower, upper, ZERO: tl.constexpr):
    """clip(d + e * w) on fp16."""
    if INTERPRETED:
        d = _clip(tl.fma(e, w, d), lower, upper)
    elif ZERO:
        d = tl.inline_asm_elementwise(
            "fma.rn.relu.f16x2 $0, $1, $2, $3; min.NaN.f16x2 $0, $0, $4;",
            "=&r,r,r,r,r",
            [e, w, d, upper],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        d = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3; max.NaN.f16x2 $0, $0, $4; min.NaN.f16x2 $0, $0, $5;",
            "=&r,r,r,r,r,r",
            [e, w, d, lower, upper],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return d


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _bias(pointer, channels, valid, PRESENT: tl.constexpr):
    """fp32 biases of these channels, 0 where there are none."""
    if PRESENT:
        return tl.load(pointer + channels, mask=valid, other=0.0).to(tl.float32)
    return tl.full(channels.shape, 0.0, tl.float32)


@triton.jit
def _matrix(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """These rows and columns of a contiguous ROWS x COLUMNS matrix, 0 beyond its edges."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _pixels(pointers, inside, channels, C_IN: tl.constexpr):
    """These channels of one slot of every patch, 0 where it lies outside the image."""
    mask = (inside != 0)[:, None] & (channels < C_IN)[None, :]
    return tl.load(pointers + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _expand_from_memory(
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
        slot = _pixels(pointers, inside, channels, C_IN)
        e = _dot(slot, _matrix(w_expand, channels, hidden, C_IN, C_HIDDEN), e, PRECISION)
    return e


@triton.jit
def _pad(
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
            e = _keep_half(e, rows[:, None], columns[:, None])
        else:
            e = tl.where((rows & columns)[:, None] != 0, e, 0.0)
    return e


@triton.jit(
    do_not_specialize=["patches", "H", "W", "H_out", "W_out", "patch_rows", "patch_columns"]
)
def inverted_residual_patch(
    x,
    w_expand,
    b_expand,
    w_dw,
    b_dw,
    w_project,
    b_project,
    y,
    patches,
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
    lower_project,
    upper_project,
    C_IN: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    EXPANSION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    B_EXPAND: tl.constexpr,
    B_DW: tl.constexpr,
    B_PROJECT: tl.constexpr,
    ZERO_EXPAND: tl.constexpr,
    ZERO_DW: tl.constexpr,
    CLIP_PROJECT: tl.constexpr,
    # Slot rows from PAD_TOP up to SAFE_ROWS lie inside the image whatever the patch, and columns.
    SAFE_ROWS: tl.constexpr,
    SAFE_COLUMNS: tl.constexpr,
    # W where a patch covers all of it, else 0.
    WHOLE_ROW: tl.constexpr,
    # Patches are counted in 64 bits, as addresses always are.
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
    PATCHES: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    OUT_TILES: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """y (N, H_out, W_out, C_out) of x (N, H, W, C_in), both channels_last, int64 addressed."""
    SLOT_ROWS: tl.constexpr = slots(PATCH_H, KERNEL, STRIDE, DILATION)
    SLOT_COLUMNS: tl.constexpr = slots(PATCH_W, KERNEL, STRIDE, DILATION)
    IN_TILES: tl.constexpr = tiles(C_IN, IN_TILE)
    OUT_GROUPS: tl.constexpr = tiles(C_OUT, OUT_TILE * OUT_TILES)
    LAST_TAP: tl.constexpr = KERNEL * KERNEL - 1
    dtype = x.dtype.element_ty

    program = tl.program_id(0)
    patch = program // OUT_GROUPS * PATCHES + tl.arange(0, PATCHES)
    if WIDE:
        patch = (program // OUT_GROUPS).to(tl.int64) * PATCHES + tl.arange(0, PATCHES)
    exists = patch < patches
    patch_column = (patch % patch_columns).to(tl.int32)
    patch_row = (patch // patch_columns % patch_rows).to(tl.int32)
    image = (patch // patch_columns // patch_rows).to(tl.int64)
    row0 = patch_row * (PATCH_H * STRIDE) - PAD_TOP
    column0 = patch_column * (PATCH_W * STRIDE) - PAD_LEFT
    first_out = program % OUT_GROUPS * (OUT_TILE * OUT_TILES)
    in_lanes = tl.arange(0, IN_TILE)
    out_lanes = tl.arange(0, OUT_TILE)

    # Masks are -1 inside the image and 0 outside, so that an `and` applies them.
    row_masks = ()
    for i in tl.static_range(SLOT_ROWS):
        row_masks = row_masks + (-(exists & (row0 + i >= 0) & (row0 + i < H)).to(tl.int32),)
    column_masks = ()
    for j in tl.static_range(SLOT_COLUMNS):
        column_masks = column_masks + (-((column0 + j >= 0) & (column0 + j < W)).to(tl.int32),)

    row_step = tl.full((), W, tl.int64) * C_IN
    # Address of slot (0, 0) of every patch in x, inside the image or not.
    first_slot = (x + ((image * H + row0) * W + column0) * C_IN)[:, None]
    kept = ()
    if EXPANSION and KEEP_X:
        for i in tl.static_range(SLOT_ROWS):
            for j in tl.static_range(SLOT_COLUMNS):
                for k in tl.static_range(IN_TILES):
                    inside = row_masks[i] & column_masks[j]
                    pointers = first_slot + (i * row_step + j * C_IN)
                    if is_read(j, PATCH_W, KERNEL, STRIDE, DILATION, PAD_LEFT, WHOLE_ROW):
                        slot = _pixels(pointers, inside, k * IN_TILE + in_lanes, C_IN)
                        kept = kept + (slot,)
                    else:
                        kept = kept + (in_lanes,)  # Never used: later ones keep their places.

    sums = ()
    for _ in tl.static_range(PATCH_H * PATCH_W):
        for o in tl.static_range(OUT_TILES):
            out = first_out + o * OUT_TILE + out_lanes
            bias_p = _bias(b_project, out, out < C_OUT, B_PROJECT)
            sums = sums + (tl.broadcast_to(bias_p[None, :], (PATCHES, OUT_TILE)),)

    hidden_type: tl.constexpr = tl.float16 if HALF else tl.float32
    lower_e = tl.full((PATCHES, CHUNK), lower_expand, hidden_type)
    upper_e = tl.full((PATCHES, CHUNK), upper_expand, hidden_type)
    lower_d = tl.full((PATCHES, CHUNK), lower_dw, hidden_type)
    upper_d = tl.full((PATCHES, CHUNK), upper_dw, hidden_type)

    for first_hidden in tl.range(0, C_HIDDEN, CHUNK):
        hidden = first_hidden + tl.arange(0, CHUNK)
        exists_hidden = hidden < C_HIDDEN
        expand_tiles = ()
        if EXPANSION:
            bias_e = _bias(b_expand, hidden, exists_hidden, B_EXPAND)
            bias_e = tl.broadcast_to(bias_e[None, :], (PATCHES, CHUNK))
            if KEEP_X:
                for k in tl.static_range(IN_TILES):
                    tile = _matrix(w_expand, k * IN_TILE + in_lanes, hidden, C_IN, C_HIDDEN)
                    expand_tiles = expand_tiles + (tile,)
        taps = ()
        for k in tl.static_range(KERNEL * KERNEL):
            weight = tl.load(w_dw + k * C_HIDDEN + hidden, mask=exists_hidden, other=0.0)
            taps = taps + (weight.to(hidden_type)[None, :],)
        bias_d = _bias(b_dw, hidden, exists_hidden, B_DW).to(hidden_type)
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
                                e = _dot(slot, expand_tiles[k], e, PRECISION)
                        else:
                            e = _expand_from_memory(
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
                            e = _clip_half(e, lower_e, upper_e, ZERO_EXPAND)
                        else:
                            e = _clip(e, lower_e, upper_e)
                        e = _pad(
                            e,
                            row_masks[i],
                            column_masks[j],
                            i >= PAD_TOP and i < SAFE_ROWS,
                            j >= PAD_LEFT and j < SAFE_COLUMNS,
                            HALF,
                        )
                    else:
                        e = _pixels(first_slot + offset, inside, hidden, C_IN).to(hidden_type)

                    updated = ()
                    for p in tl.static_range(PATCH_H):
                        for q in tl.static_range(PATCH_W):
                            d = depthwise[p * PATCH_W + q]
                            if tap(i, j, p, q, KERNEL, STRIDE, DILATION) >= 0:
                                w = taps[tap(i, j, p, q, KERNEL, STRIDE, DILATION)]
                                if HALF and tap(i, j, p, q, KERNEL, STRIDE, DILATION) == LAST_TAP:
                                    d = _last_tap_half(d, e, w, lower_d, upper_d, ZERO_DW)
                                else:
                                    d = tl.fma(e, w, d)
                            updated = updated + (d,)
                    depthwise = updated

        project_tiles = ()
        for o in tl.static_range(OUT_TILES):
            out = first_out + o * OUT_TILE + out_lanes
            project_tiles = project_tiles + (_matrix(w_project, hidden, out, C_HIDDEN, C_OUT),)
        updated = ()
        for p in tl.static_range(PATCH_H * PATCH_W):
            d = depthwise[p]
            # In fp16 the last tap has clipped already, unless it lies beyond a whole row.
            if not HALF or ends_beyond(p, PATCH_W, KERNEL, STRIDE, DILATION, PAD_LEFT, WHOLE_ROW):
                d = _clip(d, lower_d, upper_d)
            if C_HIDDEN % CHUNK != 0:
                # A clip need not keep 0, and 0 times an infinite bound would be NaN.
                d = tl.where(exists_hidden[None, :], d, 0.0)
            for o in tl.static_range(OUT_TILES):
                total = _dot(d.to(dtype), project_tiles[o], sums[p * OUT_TILES + o], PRECISION)
                updated = updated + (total,)
        sums = updated

    for o in tl.static_range(OUT_TILES):
        channels = first_out + o * OUT_TILE + out_lanes
        exists_out = channels < C_OUT
        for p in tl.static_range(PATCH_H):
            for q in tl.static_range(PATCH_W):
                row, column = patch_row * PATCH_H + p, patch_column * PATCH_W + q
                inside = exists & (row < H_out) & (column < W_out)
                mask = inside[:, None] & exists_out[None, :]
                pixel = (image * H_out + row) * W_out + column
                offsets = pixel[:, None] * C_OUT + channels[None, :]
                v = sums[(p * PATCH_W + q) * OUT_TILES + o]
                if CLIP_PROJECT:
                    v = _clip(v, lower_project, upper_project)
                if RESIDUAL:
                    v += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
                tl.store(y + offsets, v.to(dtype), mask=mask)
