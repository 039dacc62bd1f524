"""The same bits every time, at any number of threads, at any place in a batch.

What runs layers together (a fused `Sequential`, a plan) keeps this of itself; it may round in other
places than the same layers one by one, whose stem and pool are PyTorch's.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cases
import pytest
import torch
from cases import DTYPES, Case, make_inputs, run
from plan_cases import image, network
from torch import Tensor, nn

import mnv2_kernels as mk
from mnv2_kernels import inverted_residual
from mnv2_kernels.ops.backends import ran

pytestmark = pytest.mark.sampled(3)

THREADS = (1, 2, 3, 4, 7)
REPEATS = 100


def ten_cases() -> list[Case]:
    groups = cases.groups()
    return groups["S1-width1"][::3] + groups["S2"][::48] + groups["S3"][::70] + groups["S4"][-1:]


@pytest.mark.parametrize("case", ten_cases(), ids=lambda case: case.id)
def test_repeated_calls(kernel_backend, tested_dtype, case, set_threads):
    x, weights = make_inputs(case, tested_dtype)
    for threads in (1, 4):
        set_threads(threads)
        first = run(kernel_backend, x, weights, **case.settings)
        for _ in range(REPEATS):
            assert torch.equal(run(kernel_backend, x, weights, **case.settings), first)


@pytest.mark.parametrize("group", cases.groups())
def test_threads(kernel_backend, tested_dtype, group, set_threads):
    differing = []
    for case in cases.groups()[group]:
        for batch in {case.batch, 3}:
            case = replace(case, batch=batch)
            x, weights = make_inputs(case, tested_dtype)
            results = {}
            for threads in THREADS:
                set_threads(threads)
                results[threads] = run(kernel_backend, x, weights, **case.settings)
            unequal = [n for n, y in results.items() if not torch.equal(y, results[1])]
            if unequal:
                differing.append(f"{case.id} with {unequal} threads")
    assert not differing


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("batch", [2, 3, 8, 33])
def test_places_in_a_batch(kernel_backend, tested_dtype, batch, threads, set_threads):
    set_threads(threads)
    for case in ten_cases():
        image, weights = make_inputs(replace(case, batch=1), tested_dtype)
        x = torch.randn(batch, *image.shape[1:]).to(tested_dtype)
        places = sorted({0, 1, batch // 2, batch - 1})
        x[places] = image
        alone = run(kernel_backend, image, weights, **case.settings)
        together = run(kernel_backend, x, weights, **case.settings)
        assert all(torch.equal(together[i], alone[0]) for i in places), case.id


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_at_the_same_time(kernel_backend, threads, set_threads):
    set_threads(threads)
    prepared = []
    for case in ten_cases():
        x, weights = make_inputs(case)
        prepared.append((case, x, weights, run(kernel_backend, x, weights, **case.settings)))

    def differing(_) -> list[str]:
        torch.set_num_threads(threads)
        return [
            case.id
            for case, x, weights, y in prepared * 20
            if not torch.equal(
                inverted_residual(x, weights, backend=kernel_backend, **case.settings), y
            )
        ]

    with ThreadPoolExecutor(8) as pool:
        assert [ids for ids in pool.map(differing, range(8)) if ids] == []


def gradients(case: Case, x: Tensor, grad_y: Tensor, weights) -> list[Tensor]:
    """Of x, then of all weights that there are."""
    leaves = [t for t in (x, *weights.tensors()) if t is not None]
    leaves = [t.detach().requires_grad_() for t in leaves]
    given = iter(leaves[1:])
    fields = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
    own = {f: next(given) for f in fields if getattr(weights, f) is not None}
    y = run("cpu", leaves[0], replace(weights, **own), **case.settings)
    return list(torch.autograd.grad(y, leaves, grad_y))


@pytest.mark.parametrize("case", ten_cases(), ids=lambda case: case.id)
def test_gradients(kernel_backend, tested_dtype, case, set_threads):
    """Of x also at any place in any batch; gradients of weights are sums over the batch."""
    case = replace(case, batch=5)
    x, weights = make_inputs(case, tested_dtype)
    set_threads(1)
    height, width = case.config.output_hw(case.height, case.width)
    grad_y = torch.randn(5, case.config.out_channels, height, width).to(tested_dtype)
    first = gradients(case, x, grad_y, weights)
    assert all(g.isfinite().all() and g.any() for g in first)
    for threads in (1, *THREADS):
        set_threads(threads)
        again = gradients(case, x, grad_y, weights)
        assert all(map(torch.equal, again, first)), f"{threads} threads"
        for order in ([4, 3, 2, 1, 0], [1, 1, 1, 2, 1], [3], [0, 2], [4, 4, 1], [2, 1, 0] * 4):
            moved, *_ = gradients(case, x[order], grad_y[order], weights)
            assert torch.equal(moved, first[0][order]), f"{order} with {threads} threads"


def fused(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return mk.fuse(model.to(dtype)).features


def planned(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return mk.plan(model, (3, 64, 75), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [fused, planned], ids=lambda way: way.__name__)
@torch.no_grad()
def test_whole_networks(kernel_backend, way, dtype, set_threads):
    """All layers in one call, at every number of threads and place, again and again."""
    before = ran().get("network", 0)
    forward = way(copy.deepcopy(network("ours-0.35")), dtype)
    x = image(5, 3, 64, 75).to(dtype)
    set_threads(1)
    alone = torch.cat([forward(x[i : i + 1]) for i in range(5)])
    assert alone.isfinite().all() and len({str(y) for y in alone}) == 5
    for threads in THREADS:
        set_threads(threads)
        for batch in (1, 2, 3, 5):
            for begin in {0, 5 - batch}:
                part = slice(begin, begin + batch)
                for _ in range(3):
                    assert torch.equal(forward(x[part]), alone[part]), (threads, part)
    calls = ran().get("network", 0) - before
    assert calls == (0 if way is planned else 5 + len(THREADS) * 7 * 3)
