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

from .geometry import ends_beyond, tiles
from .hidden import bias, depthwise_chunk, dot, matrix, under_patches
from .values import activate


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
    # Numbers of the curves, 0 for a clip.
    CURVE_EXPAND: tl.constexpr,
    CURVE_DW: tl.constexpr,
    CURVE_PROJECT: tl.constexpr,
    ACTIVATE_PROJECT: tl.constexpr,
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
    OUT_GROUPS: tl.constexpr = tiles(C_OUT, OUT_TILE * OUT_TILES)
    dtype = x.dtype.element_ty

    program = tl.program_id(0)
    patch = program // OUT_GROUPS * PATCHES + tl.arange(0, PATCHES)
    if WIDE:
        patch = (program // OUT_GROUPS).to(tl.int64) * PATCHES + tl.arange(0, PATCHES)
    exists = patch < patches
    patch_column = (patch % patch_columns).to(tl.int32)
    patch_row = (patch // patch_columns % patch_rows).to(tl.int32)
    image = (patch // patch_columns // patch_rows).to(tl.int64)
    first_out = program % OUT_GROUPS * (OUT_TILE * OUT_TILES)
    out_lanes = tl.arange(0, OUT_TILE)

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

    sums = ()
    for _ in tl.static_range(PATCH_H * PATCH_W):
        for o in tl.static_range(OUT_TILES):
            out = first_out + o * OUT_TILE + out_lanes
            bias_p = bias(b_project, out, out < C_OUT, B_PROJECT)
            sums = sums + (tl.broadcast_to(bias_p[None, :], (PATCHES, OUT_TILE)),)

    hidden_type: tl.constexpr = tl.float16 if HALF else tl.float32
    lower_e = tl.full((PATCHES, CHUNK), lower_expand, hidden_type)
    upper_e = tl.full((PATCHES, CHUNK), upper_expand, hidden_type)
    lower_d = tl.full((PATCHES, CHUNK), lower_dw, hidden_type)
    upper_d = tl.full((PATCHES, CHUNK), upper_dw, hidden_type)

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
            (lower_e, upper_e, lower_d, upper_d),
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
            ZERO_EXPAND,
            ZERO_DW,
            SAFE_ROWS,
            SAFE_COLUMNS,
            WHOLE_ROW,
            PRECISION,
            HALF,
            PATCHES,
            PATCH_H,
            PATCH_W,
            CHUNK,
            IN_TILE,
            KEEP_X,
        )

        project_tiles = ()
        for o in tl.static_range(OUT_TILES):
            out = first_out + o * OUT_TILE + out_lanes
            project_tiles = project_tiles + (matrix(w_project, hidden, out, C_HIDDEN, C_OUT),)
        updated = ()
        for p in tl.static_range(PATCH_H * PATCH_W):
            d = depthwise[p]
            # In fp16 the last tap has clipped already, unless it lies beyond a whole row.
            if not HALF or ends_beyond(p, PATCH_W, KERNEL, STRIDE, DILATION, PAD_LEFT, WHOLE_ROW):
                d = activate(d, lower_d, upper_d, CURVE_DW)
            if C_HIDDEN % CHUNK != 0:
                # A clip need not keep 0, and 0 times an infinite bound would be NaN.
                d = tl.where(exists_hidden[None, :], d, 0.0)
            for o in tl.static_range(OUT_TILES):
                total = dot(d.to(dtype), project_tiles[o], sums[p * OUT_TILES + o], PRECISION)
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
                if ACTIVATE_PROJECT:
                    v = activate(v, lower_project, upper_project, CURVE_PROJECT)
                if RESIDUAL:
                    v += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
                tl.store(y + offsets, v.to(dtype), mask=mask)
