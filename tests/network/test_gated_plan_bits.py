"""Plans of networks with squeeze-excite and curves: the same bits everywhere, in all copies.

A plan that owns memory for fewer threads than call it runs in a child process, since it may write
beyond it: `python test_gated_plan_bits.py call_with_more_threads NAME`.
"""

import pickle
import sys
from copy import deepcopy

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from gated_networks import NETWORKS, network, three_layers_at_the_end
from memory_layouts import layouts_of
from plan_cases import image, why_bits_differ

import mnv2_kernels as mk

pytestmark = [
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
    pytest.mark.sampled(3),
]

networks = pytest.mark.parametrize("name", NETWORKS)


@networks
def test_at_any_threads_and_place(name, set_threads):
    x = image(9, 3, 97, 130)
    plan = mk.plan(network(name), x.shape)
    assert why_bits_differ(plan, x, set_threads, (1, 3, 9), (1, 2)) is None


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@networks
def test_in_every_dtype(name, dtype, set_threads):
    x = image(5, 3, 40, 56).to(dtype)
    plan = mk.plan(network(name), x.shape, dtype=dtype)
    assert why_bits_differ(plan, x, set_threads, (1, 2, 3, 5), (1, 2, 3, 5)) is None


@networks
@torch.no_grad()
def test_of_fused_models(name, set_threads):
    x = image(7, 3, 64, 75)
    fused = mk.fuse(network(name))
    set_threads(1)
    fused(x)
    assert why_bits_differ(fused, x, set_threads, (1, 3, 7), (1, 2)) is None


@networks
def test_in_any_layout_and_beside_any_image(name):
    x = image(3, 3, 40, 51)
    plan = mk.plan(network(name), x.shape)
    for layout, other in layouts_of(x):
        # Some layouts hold other values.
        assert torch.equal(plan(other), plan(other.contiguous())), layout
    right = plan(x)
    x[1] = torch.nan
    y = plan(x)
    assert torch.equal(y[::2], right[::2]) and y[1].isnan().all()


@networks
def test_of_an_owned_arena_and_of_copies(name, set_threads):
    x = image(3, 3, 64, 75)
    right = mk.plan(network(name), x.shape)(x)
    set_threads(2)
    owning = mk.plan(network(name), x.shape, own_arena=True)
    allocating = mk.plan(network(name), x.shape)
    copies = [owning, *(c for p in (owning, allocating) for c in copies_of(p))]
    for threads in (1, 2):
        set_threads(threads)
        for plan in copies:
            assert torch.equal(plan(x), right)
            assert torch.equal(plan(x[2:3]), right[2:3])
    assert [plan.owned_bytes > 0 for plan in copies] == [True, True, True, False, False]


def copies_of(plan) -> tuple:
    return deepcopy(plan), pickle.loads(pickle.dumps(plan))


def call_with_more_threads(name: str) -> None:
    x = image(3, 3, 64, 75)
    right = mk.plan(network(name), x.shape)(x)
    for made_with in (1, 2):
        torch.set_num_threads(made_with)
        plan = mk.plan(network(name), x.shape, own_arena=True)
        for threads in (2, 3, 4, 5, 7):
            torch.set_num_threads(threads)
            for _ in range(5):
                print(made_with, threads, flush=True)
                assert torch.equal(plan(x), right)
                assert torch.equal(plan(x[2:3]), right[2:3])
    print("checked", flush=True)


@pytest.mark.parametrize("name", ["mobilenet_v3_small"])
def test_of_an_arena_of_fewer_threads_than_call_it(name, python):
    done = python(__file__, "call_with_more_threads", name, OMP_NUM_THREADS="1")
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    assert printed[-1] == "checked"


@torch.no_grad()
def test_of_three_fully_connected_layers_at_the_end(set_threads):
    model = three_layers_at_the_end()
    for dtype in cases.DTYPES:
        x = image(11, 3, 7, 5).to(dtype)
        plan = mk.plan(model, x.shape, dtype=dtype)
        assert why_bits_differ(plan, x, set_threads, (1, 2, 3, 9, 11), (1, 2, 3)) is None


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
