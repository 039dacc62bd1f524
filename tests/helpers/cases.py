"""All test shapes and tolerances, and the comparison that every test of values uses.

A result passes against the truth, the reference in float64 on the same rounded inputs, if its
errors stay near the errors of the reference in the result's own dtype:

    max error  <= 2 * eager max error + FLOOR * eps(dtype) * max|truth|
    mean error <= 1.5 * eager mean error + FLOOR / 4 * eps(dtype) * max|truth|

The floors are for tensors so small that eager can be exact by luck.
"""

import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.block.config import (
    NO_CLIP,
    RELU,
    RELU6,
    BlockConfig,
    Clip,
    Padding,
    inverted_residual_config,
    mobilenet_v2_block_inputs,
    same_padding,
)
from mnv2_kernels.ops import reference
from mnv2_kernels.ops.backends import BACKENDS, ran

FLOOR = 8
# Whether tests that have a short and a long form take the long one: `make test-long` asks for it.
LONG = os.environ.get("MNV2_LONG") == "1"

# Whether the kernels of another instruction set than the machine's best run: `make test-isa`. What
# does not depend on that is left to the other runs.
NARROWER = "ATEN_CPU_CAPABILITY" in os.environ and not LONG
once = pytest.mark.skipif(NARROWER, reason="the same on every instruction set")

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends() -> list[str]:
    """The backends to test here. A missing compiled kernel is kept, so that its tests fail."""
    if NARROWER:
        return ["cpu"]
    without_cpp = os.environ.get("MNV2_KERNELS_SKIP_CPP") == "1"
    return [
        b.name
        for b in BACKENDS
        if (not without_cpp if b.name == "cpu" else b.why_not(torch.empty(0)) is None)
    ]


def kernel_backends() -> list[str]:
    """The backends that keep the promises PyTorch's own kernels do not make."""
    return [name for name in backends() if name != "reference"]


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What to test a backend in; in 16 bits the reference is what the others are held against."""
    return DTYPES[:1] if backend == "reference" else DTYPES


@dataclass(frozen=True)
class Case:
    """A block, the size of its input, which biases it has and how its stages are clipped."""

    config: BlockConfig
    height: int
    width: int
    batch: int = 1
    biases: tuple[bool, bool, bool] = (True, True, True)
    clips: tuple[Clip, Clip, Clip] = (RELU6, RELU6, NO_CLIP)

    @property
    def id(self) -> str:
        config = self.config
        parts = [
            config.name if config.expansion else f"t1-{config.name}",
            f"d{config.dilation}",
            "p" + ",".join(map(str, config.padding)),
            f"{self.batch}x{self.height}x{self.width}",
        ]
        if config.residual:
            parts.append("residual")
        if not all(self.biases):
            parts.append("biases" + "".join("01"[b] for b in self.biases))
        if self.clips != (RELU6, RELU6, NO_CLIP):
            parts.append("clips" + ",".join(f"{lo:g}..{hi:g}" for lo, hi in self.clips))
        return "-".join(parts)

    @property
    def settings(self) -> dict:
        """The keyword arguments of a call."""
        names = ("stride", "padding", "dilation", "residual")
        return {name: getattr(self.config, name) for name in names}


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, FoldedWeights]:
    """x (NCHW) and weights, fixed by the case; both clips of both hidden tensors are active.

    In 16 bits biases hold numbers of that dtype in float32, where `fold` leaves them: PyTorch's
    layers, which round them, lose nothing by that.
    """
    config, generator = case.config, torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    randn = partial(torch.randn, generator=generator)
    c_in, hidden, c_out = config.in_channels, config.hidden_channels, config.out_channels
    kernel = config.kernel_size
    x = randn(case.batch, c_in, case.height, case.width)
    biases = [
        randn(channels) + mean if present else None
        for channels, mean, present in zip(
            (hidden, hidden, c_out), (1.0, 1.0, 0.0), case.biases, strict=True
        )
    ]
    weights = FoldedWeights(
        w_expand=randn(c_in, hidden) * 3 / c_in**0.5 if config.expansion else None,
        b_expand=biases[0] if config.expansion else None,
        # A clipped expansion has a mean square near 9, x has 1: 3 is their common scale.
        w_dw=randn(kernel, kernel, hidden) * (1 if config.expansion else 3) / kernel,
        b_dw=biases[1],
        w_project=randn(hidden, c_out) / hidden**0.5,
        b_project=biases[2],
        clip_expand=case.clips[0] if config.expansion else NO_CLIP,
        clip_dw=case.clips[1],
        clip_project=case.clips[2],
    )
    rounded = weights.to(dtype)
    names = ("b_expand", "b_dw", "b_project")
    biases = {n: b.float() for n in names if (b := getattr(rounded, n)) is not None}
    return x.to(dtype), replace(rounded, **biases)


@dataclass(frozen=True)
class Expected:
    """The float64 truth, and how far PyTorch's own kernels are from it in `dtype`."""

    truth: Tensor
    dtype: torch.dtype
    eager_max: float
    eager_mean: float


def expect(case: Case, x: Tensor, weights: FoldedWeights) -> Expected:
    """What a call on x and weights must give; also for inputs other than `make_inputs(case)`."""
    truth = reference.inverted_residual(x.double(), weights.to(torch.float64), **case.settings)
    eager = reference.inverted_residual(x, weights, **case.settings)
    return Expected(truth, x.dtype, *_errors(eager, truth))


def why_wrong(y: Tensor, expected: Expected) -> str | None:
    """None where y passes, otherwise its errors and the allowed ones."""
    truth = expected.truth
    if y.shape != truth.shape or y.dtype != expected.dtype:
        return f"{y.dtype} {tuple(y.shape)}, not {expected.dtype} {tuple(truth.shape)}"
    if y.numel() == 0:
        return None
    worst, mean = _errors(y, truth)
    floor = FLOOR * torch.finfo(expected.dtype).eps * truth.abs().max().item()
    worst_allowed = 2 * expected.eager_max + floor
    mean_allowed = 1.5 * expected.eager_mean + floor / 4
    if worst <= worst_allowed and mean <= mean_allowed:
        return None
    return (
        f"max error {worst:.2e} (allowed {worst_allowed:.2e}, eager {expected.eager_max:.2e}),"
        f" mean error {mean:.2e} (allowed {mean_allowed:.2e}, eager {expected.eager_mean:.2e})"
    )


def mean_error(y: Tensor, expected: Expected) -> float:
    return _errors(y, expected.truth)[1]


def _errors(y: Tensor, truth: Tensor) -> tuple[float, float]:
    if y.numel() == 0:
        return 0.0, 0.0
    error = (y.double() - truth).abs()
    return error.max().item(), error.mean().item()


def run(backend: str, x: Tensor, weights: FoldedWeights, **settings) -> Tensor:
    """One call, which must have run on this backend and no other."""
    with runs_on(backend):
        return inverted_residual(x, weights, backend=backend, **settings)


@contextmanager
def runs_on(*backends: str) -> Iterator[None]:
    """Fails unless what is called inside runs kernels on these backends and no others."""
    before = ran()
    yield
    found = set(ran() - before)
    assert found == set(backends), f"{backends} must run, got {found}"


def pairwise(
    choices: dict[str, Sequence], valid: Callable[[dict], bool] = lambda row: True
) -> Iterator[dict]:
    """Rows that hold every pair of values of two columns that any valid row holds."""
    rows = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    rows = [row for row in rows if valid(row)]
    random.Random(0).shuffle(rows)
    pairs = [list(combinations(row.items(), 2)) for row in rows]
    missing: dict[tuple, list[int]] = {}
    for i, row_pairs in enumerate(pairs):
        for pair in row_pairs:
            missing.setdefault(pair, []).append(i)
    while missing:
        candidates = next(iter(missing.values()))[:30]
        best = max(candidates, key=lambda i: sum(pair in missing for pair in pairs[i]))
        for pair in pairs[best]:
            missing.pop(pair, None)
        yield rows[best]


def tf_same_padding(config: BlockConfig, height: int, width: int) -> Padding:
    """TensorFlow's SAME: ceil(size / stride) outputs, the odd row or column of zeros last."""
    extent = config.dilation * (config.kernel_size - 1)

    def both_sides(size: int) -> tuple[int, int]:
        total = max(0, extent + 1 + ((size - 1) // config.stride) * config.stride - size)
        return total // 2, total - total // 2

    (top, bottom), (left, right) = both_sides(height), both_sides(width)
    return top, left, bottom, right


def real_blocks(width_mult: float, resolution: int) -> list[Case]:
    """S1: the distinct blocks of MobileNetV2, with the input sizes of an image."""
    sized = dict.fromkeys(mobilenet_v2_block_inputs(width_mult, resolution))
    return [Case(config, size, size) for config, size in sized]


def efficientnet_lite0_blocks(resolution: int) -> list[Case]:
    """S1: the distinct blocks of EfficientNet-Lite0, padded as TensorFlow does."""
    in_channels, size, cases = 32, resolution // 2, []
    settings = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )
    for expand_ratio, channels, repeats, first_stride, kernel in settings:
        for stride in [first_stride] + [1] * (repeats - 1):
            config = inverted_residual_config(in_channels, channels, stride, expand_ratio, kernel)
            config = replace(config, padding=tf_same_padding(config, size, size))
            cases.append(Case(config, size, size))
            in_channels, (size, _) = channels, config.output_hw(size, size)
    return list(dict.fromkeys(cases))


def edges() -> Iterator[Case]:
    """S2: every pair of sizes, strides, kernels, dilations and paddings."""
    sizes = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33)

    def case(row: dict) -> Case:
        stride, kernel, dilation = row["stride"], row["kernel"], row["dilation"]
        channels = row["channels"]
        config = BlockConfig(*channels, stride, True, kernel, dilation)
        extent = dilation * (kernel - 1)
        padding = {
            "none": (0, 0, 0, 0),
            "symmetric": same_padding(kernel, dilation),
            "tensorflow": tf_same_padding(config, row["height"], row["width"]),
            "one-sided": (0, extent, 1, 0),
            "all": (extent,) * 4,
        }[row["padding"]]
        config = replace(config, padding=padding)
        same_size = config.output_hw(row["height"], row["width"]) == (row["height"], row["width"])
        residual = channels[0] == channels[2] and same_size
        return Case(replace(config, residual=residual), row["height"], row["width"])

    rows = pairwise(
        {
            "height": sizes,
            "width": sizes,
            "stride": (1, 2),
            "kernel": (3, 5),
            "dilation": (1, 2),
            "padding": ("none", "symmetric", "tensorflow", "one-sided", "all"),
            "channels": ((5, 19, 7), (16, 48, 16), (24, 72, 24)),
        },
        lambda row: min(case(row).config.output_hw(row["height"], row["width"])) >= 1,
    )
    return map(case, rows)


def channel_counts() -> Iterator[Case]:
    """S3: every pair of channel counts around the lane and tile sizes."""
    counts = (1, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 64, 65, 96, 144, 961)
    for row in pairwise({"in": counts, "hidden": counts, "out": counts}):
        c_in, hidden, c_out = row.values()
        config = BlockConfig(c_in, hidden, c_out, residual=c_in == c_out)
        yield Case(config, 5, 4)


def batches_and_options() -> Iterator[Case]:
    """S4: batch sizes, no expansion, residual, optional biases and clip bounds."""
    odd_clips = ((-1.5, 2.5), (-0.5, 3.0), (-2.0, 1.0))
    rows = pairwise(
        {
            "batch": (0, 1, 2, 3, 5, 33),
            "expansion": (True, False),
            "residual": (True, False),
            "stride": (1, 2),
            "biases": tuple(product((True, False), repeat=3)),
            "clips": (
                (RELU6, RELU6, NO_CLIP),
                (RELU, RELU, NO_CLIP),
                (NO_CLIP, NO_CLIP, NO_CLIP),
                (RELU6, RELU6, RELU6),
                odd_clips,
            ),
        },
        lambda row: not (row["residual"] and row["stride"] == 2),
    )
    for row in rows:
        hidden = 40 if row["expansion"] else 12
        config = BlockConfig(12, hidden, 12, row["stride"], row["expansion"])
        config = replace(config, residual=row["residual"])
        yield Case(config, 6, 9, row["batch"], row["biases"], row["clips"])


@cache
def groups() -> dict[str, list[Case]]:
    """Every shape, by the name of its group."""
    return {
        **{f"S1-width{w:g}": real_blocks(w, 56) for w in (0.35, 0.5, 0.75, 1.0, 1.4)},
        "S1-full": real_blocks(1.0, 224),
        "S1-lite0": efficientnet_lite0_blocks(56),
        "S2": list(edges()),
        "S3": list(channel_counts()),
        "S4": list(batches_and_options()),
    }


def tested(group: str) -> list[Case]:
    """The shapes of a group to test here: on a narrower instruction set one of each kind.

    Kinds differ in what is compiled for each: stride, kernel, dilation, expansion, and the
    tail of the channels after whole vectors.
    """
    if not NARROWER:
        return groups()[group]
    kinds: dict[tuple, Case] = {}
    for case in groups()[group]:
        config = case.config
        counts = config.in_channels, config.hidden_channels, config.out_channels
        tails = [next(n for n in (16, 8, 1) if count % n == 0) for count in counts]
        kind = config.stride, config.kernel_size, config.dilation, config.expansion, *tails
        kinds.setdefault(kind, case)
    return list(kinds.values())
