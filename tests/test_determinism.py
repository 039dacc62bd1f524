"""The same bits every time, at any number of threads, at any place in a batch."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cases
import pytest
import torch
from cases import Case, make_inputs, run

from mnv2_kernels import inverted_residual

THREADS = (1, 2, 3, 4, 7)
REPEATS = 100


def ten_cases() -> list[Case]:
    groups = cases.groups()
    return groups["S1-width1"][::3] + groups["S2"][::48] + groups["S3"][::70] + groups["S4"][-1:]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ten_cases(), ids=lambda case: case.id)
def test_repeated_calls(kernel_backend, case, set_threads):
    x, weights = make_inputs(case)
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


def test_gradients(kernel_backend):
    """Two backward passes give the same bits; those of PyTorch's kernels do at one thread count."""
    case = ten_cases()[1]
    x, weights = make_inputs(case)
    x.requires_grad_()
    grads = []
    for _ in range(10):
        y = run(kernel_backend, x, weights, **case.settings)
        grads += torch.autograd.grad(y.square().sum(), x)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
