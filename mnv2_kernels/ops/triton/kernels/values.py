"""What the kernels do to single values: clips, in fp32 and in fp16, curves and masks."""

import triton
import triton.language as tl

# The interpreter knows neither PTX nor products of bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def clip(v, lower, upper):
    """NaN stays NaN, as in PyTorch."""
    v = tl.maximum(v, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip_half(v, lower, upper, ZERO: tl.constexpr):
    """fp32 -> clipped fp16; ZERO where lower is 0. Three (two) instructions for two values."""
    if INTERPRETED:
        v = clip(v.to(tl.float16), lower, upper)
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
def keep_half(v, rows, columns):
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
def last_tap_half(d, e, w, lower, upper, ZERO: tl.constexpr):
    """clip(d + e * w) on fp16."""
    if INTERPRETED:
        d = clip(tl.fma(e, w, d), lower, upper)
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
def summed(v, AXIS: tl.constexpr):
    """As tl.sum, which the interpreter has only where all of Triton was imported for it."""
    return tl.reduce(v, AXIS, tl.standard._sum_combine)


@triton.jit
def over_sigmoid(v, z):
    """v * sigmoid(z)"""
    return v / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def hard_sigmoid(v):
    """relu6(v + 3) / 6"""
    return clip(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def activate(v, lower, upper, CURVE: tl.constexpr):
    """The clip, or a curve by its number in the op `mbconv`, of fp32."""
    if CURVE == 0:
        v = clip(v, lower, upper)
    elif CURVE == 1:
        v = v * hard_sigmoid(v)
    else:
        # Of -infinity what comes of the lowest finite number: a zero, and not infinity / infinity.
        v = tl.maximum(v, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
        if CURVE == 2:
            v = over_sigmoid(v, v)
        elif CURVE == 3:
            v = v * (0.5 + 0.5 * tl.erf(v * 0.7071067811865476))
        else:
            v = over_sigmoid(v, v * (1.5957691216057308 + 0.07135481627260025 * v * v))
    return v
