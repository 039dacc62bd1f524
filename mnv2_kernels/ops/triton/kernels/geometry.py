"""What the patch kernel knows when it is compiled: which slots there are, and who reads them."""

import triton


@triton.constexpr_function
def slots(patch, kernel, stride, dilation):
    """Rows (or columns) of input under a patch of `patch` rows (or columns)."""
    return (patch - 1) * stride + dilation * (kernel - 1) + 1


@triton.constexpr_function
def tap(i, j, p, q, kernel, stride, dilation):
    """The depthwise tap through which output (p, q) of a patch reads slot (i, j); -1 for none."""
    down, right = i - p * stride, j - q * stride
    reach = dilation * (kernel - 1)
    if not (0 <= down <= reach and 0 <= right <= reach) or down % dilation or right % dilation:
        return -1
    return down // dilation * kernel + right // dilation


@triton.constexpr_function
def is_read(slot, patch, kernel, stride, dilation, pad=0, size=0):
    """Whether any output row of a patch reads this slot row; columns likewise.

    `size`, where it is not 0, is the size of an image that one patch covers from end to end: slots
    beyond `pad` and `size` are then outside for every patch, and never needed.
    """
    if size and not pad <= slot < pad + size:
        return False
    offsets = [slot - output * stride for output in range(patch)]
    return any(0 <= o <= dilation * (kernel - 1) and o % dilation == 0 for o in offsets)


@triton.constexpr_function
def ends_beyond(p, patch_w, kernel, stride, dilation, pad, size):
    """Whether the last tap of a patch's p-th output lies right of the row that the patch covers.

    `size` is that row's, 0 where a patch does not cover a whole one.
    """
    return size != 0 and p % patch_w * stride + dilation * (kernel - 1) >= pad + size


@triton.constexpr_function
def tiles(channels, tile):
    """Tiles that it takes to cover the channels."""
    return (channels + tile - 1) // tile
