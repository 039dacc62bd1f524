"""Gradients: of the reference against finite differences, of the op against the reference."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from math import isfinite

import cases
import pytest
import torch
from cases import Case, make_inputs, run
from torch import Tensor

from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig

FIELDS = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")


def call(backend: str, tensors: list, weights: FoldedWeights, settings: dict) -> Tensor:
    """The block with (x, six weights) in place of `weights`'."""
    x, *others = tensors
    weights = replace(weights, **dict(zip(FIELDS, others, strict=True)))
    return inverted_residual(x, weights, backend=backend, **settings)


def tiny_cases() -> list[Case]:
    rows = cases.pairwise(
        {
            "kernel": (3, 5),
            "stride": (1, 2),
            "dilation": (1, 2),
            "expansion": (True, False),
            "biases": tuple(product((True, False), repeat=3)),
            "padding": ((1, 1, 1, 1), (0, 0, 1, 1), (2, 0, 1, 2), (0, 0, 0, 0), (0, 2, 2, 0)),
            "clip_project": (NO_CLIP, RELU6),
            "residual": (True, False),
        },
        lambda row: not row["residual"] or row["stride"] == 1 and row["padding"][0] == 1,
    )
    found = []
    for row in rows:
        extent = row["dilation"] * (row["kernel"] - 1)
        padding = (extent // 2,) * 4 if row["residual"] else row["padding"]
        hidden = 3 if row["expansion"] else 2
        config = BlockConfig(
            2,
            hidden,
            2,
            row["stride"],
            row["expansion"],
            row["kernel"],
            row["dilation"],
            padding,
            row["residual"],
        )
        size = max(3, extent + (not any(padding)))
        clips = (RELU6, RELU6, row["clip_project"])
        found.append(Case(config, size, size + 1, 1, row["biases"], clips))
    return found


def distance_to_clips(x: Tensor, weights: FoldedWeights, case: Case) -> float:
    """How far the nearest value before a clip is from that clip's bounds."""
    settings = case.settings | {"residual": False}
    identity = torch.eye(case.config.hidden_channels, dtype=x.dtype)
    no_project = replace(weights, w_project=identity, b_project=None, clip_project=NO_CLIP)
    unclipped = [
        (replace(no_project, clip_dw=NO_CLIP), settings, weights.clip_dw),
        (replace(weights, clip_project=NO_CLIP), settings, weights.clip_project),
    ]
    if weights.w_expand is not None:
        centre = torch.zeros(3, 3, len(identity), dtype=x.dtype)
        centre[1, 1] = 1
        expansion = replace(no_project, w_dw=centre, b_dw=None, clip_expand=NO_CLIP)
        unclipped.append((replace(expansion, clip_dw=NO_CLIP), {}, weights.clip_expand))
    distances = []
    for changed, arguments, clip in unclipped:
        y = inverted_residual(x, changed, backend="reference", **arguments)
        distances += [(y - bound).abs().min().item() for bound in clip if isfinite(bound)]
    return min(distances)


def away_from_clips(case: Case) -> tuple[Tensor, FoldedWeights]:
    """Inputs of the case in float64 where finite differences cross no clip."""
    x, weights = make_inputs(case)
    weights = weights.to(torch.float64)
    for seed in count():
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if distance_to_clips(x, weights, case) > 1e-3:
            return x, weights


def larger_cases() -> list[Case]:
    """Real blocks' channels on a few pixels, and as many of the edges."""
    blocks = [
        BlockConfig(8, 24, 8, residual=True),
        BlockConfig(8, 32, 12, stride=2),
        BlockConfig(12, 36, 8, kernel_size=5, padding=(2,) * 4),
        BlockConfig(6, 18, 10, 2, kernel_size=5, padding=(1, 1, 2, 2)),
        BlockConfig(16, 16, 8, expansion=False),
    ]
    sizes = ((4, 5), (3, 7), (6, 4), (5, 5))
    return [
        Case(config, *size, batch=1 + i % 2) for config in blocks for i, size in enumerate(sizes)
    ]


def check_finite_differences(case: Case, **options) -> None:
    x, weights = away_from_clips(case)
    leaves = [t if t is None else t.requires_grad_() for t in (x, *weights.tensors())]
    present = [i for i, t in enumerate(leaves) if t is not None]

    def block(*given):
        tensors = list(leaves)
        for i, t in zip(present, given, strict=True):
            tensors[i] = t
        return call("reference", tensors, weights, case.settings)

    assert torch.autograd.gradcheck(block, [leaves[i] for i in present], **options), case.id


def test_reference_against_finite_differences():
    members = tiny_cases()
    assert len(members) >= 40
    for case in members:
        check_finite_differences(case)


def test_larger_blocks_against_finite_differences():
    """Along random directions: one number for all elements of a Jacobian."""
    members = larger_cases()
    for case in members:
        check_finite_differences(case, fast_mode=True)


def gradients(
    backend: str,
    case: Case,
    grad_y: Callable[[Tensor], Tensor],
    needs_grad: tuple[bool, ...] = (True,) * 7,
) -> list[Tensor | None]:
    x, weights = make_inputs(case)
    leaves = [
        t if t is None else t.requires_grad_(needed)
        for t, needed in zip((x, *weights.tensors()), needs_grad, strict=True)
    ]
    y = call(backend, leaves, weights, case.settings)
    y.backward(grad_y(y))
    return [None if t is None else t.grad for t in leaves]


def assert_same_gradients(backend: str, case: Case, *args) -> None:
    ours, theirs = (gradients(b, case, *args) for b in (backend, "reference"))
    for name, a, b in zip(("x", *FIELDS), ours, theirs, strict=True):
        assert (a is None) == (b is None), f"{name} of {case.id}"
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n} of {case.id}: {m}"
            )


GRAD_LAYOUTS = {
    "contiguous": lambda y: torch.randn(y.shape),
    "channels_last": torch.randn_like,
    "expanded": lambda y: torch.tensor(0.5).expand(y.shape),
    "expanded per channel": lambda y: torch.randn(y.shape[1], 1, 1).expand(y.shape),
    "sliced": lambda y: torch.randn(*y.shape[:3], y.shape[3] + 5)[..., 2:-3],
    "every second channel": lambda y: torch.randn(len(y), y.shape[1] * 2, *y.shape[2:])[:, ::2],
    "transposed": lambda y: torch.randn(*y.shape[:2], y.shape[3], y.shape[2]).mT,
}


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_any_layout_of_the_incoming_gradient(kernel_backend, layout):
    def grad_y(y):
        torch.manual_seed(1)
        return GRAD_LAYOUTS[layout](y)

    members = cases.groups()["S4"] + cases.groups()["S2"][::16]
    for case in members:
        assert_same_gradients(kernel_backend, case, grad_y)


def test_every_subset_of_gradients(kernel_backend):
    case = Case(BlockConfig(6, 20, 6, residual=True), 5, 6, batch=2)
    subsets = [needs for needs in product((False, True), repeat=7) if any(needs)]
    for needs_grad in subsets:
        assert_same_gradients(kernel_backend, case, torch.ones_like, needs_grad)


def test_gradient_is_zero_at_and_beyond_the_clips(backend):
    channels = 5
    identity = torch.eye(channels)
    centre = torch.nn.functional.pad(torch.ones(1, 1, channels), (0, 0, 1, 1, 1, 1))
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0]).reshape(1, channels, 1, 1).requires_grad_()
    weights = FoldedWeights(identity, None, centre, None, identity, None, clip_dw=NO_CLIP)
    run(backend, x, weights).sum().backward()
    assert x.grad.flatten().tolist() == [0, 0, 1, 0, 0]


def test_second_derivatives_are_refused_by_the_op_only(kernel_backend):
    case = Case(BlockConfig(3, 5, 3), 4, 4)
    for backend in (kernel_backend, "reference"):
        x, weights = make_inputs(case)
        y = run(backend, x.requires_grad_(), weights, **case.settings)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        if backend == "reference":
            grad.sum().backward()
        else:
            with pytest.raises(NotImplementedError, match="second derivatives"):
                grad.sum().backward()


def test_inputs_may_not_change_between_forward_and_backward(kernel_backend):
    case = Case(BlockConfig(3, 5, 3), 4, 4)
    x, weights = make_inputs(case)
    y = run(kernel_backend, x.requires_grad_(), weights, **case.settings)
    weights.w_project.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
