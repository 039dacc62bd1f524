"""No access outside the tensors given: canaries around them, then pages that cannot be touched.

A guard page is hit by SIGSEGV, so those calls run in a child process, which names every case
before it runs it: `python test_memory_safety.py run_guarded BACKEND S1 float32`. Inputs are put
before and after guard pages one by one; guard_malloc.c does so with whatever torch allocates in a
call.
"""

import ctypes
import mmap
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import cases
import pytest
import torch
from cases import LAYOUTS, Case, expect, make_inputs, run, why_wrong
from torch import Tensor

from mnv2_kernels import FoldedWeights

pytestmark = pytest.mark.sampled(3)

TENSORS = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
BAND = 67
LIBC = ctypes.CDLL(None, use_errno=True)


def relocate(
    x: Tensor, weights: FoldedWeights, move: Callable[[Tensor], Tensor]
) -> tuple[Tensor, FoldedWeights]:
    """Inputs with every tensor replaced by what `move`, which sees it contiguous, makes of it."""
    present = {f: t for f in TENSORS if (t := getattr(weights, f)) is not None}
    moved = replace(weights, **{f: move(t.contiguous()) for f, t in present.items()})
    return move(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2), moved


def carve(buffers: dict[torch.dtype, Tensor]) -> Callable[[Tensor], Tensor]:
    """Places tensors one after the other in the buffer of their dtype, a band of it around each."""
    used = dict.fromkeys(buffers, BAND)

    def place(tensor: Tensor) -> Tensor:
        begin = used[tensor.dtype]
        used[tensor.dtype] += tensor.numel() + BAND
        view = buffers[tensor.dtype][begin : begin + tensor.numel()].view(tensor.shape)
        return view.copy_(tensor)

    return place


@pytest.mark.parametrize("group", cases.groups())
def test_neighbours_in_memory_neither_matter_nor_change(backend, tested_dtype, group):
    wrong = {}
    members = cases.groups()[group][:: 2 if group in ("S2", "S3") else 1]
    for case in members:
        x, weights = make_inputs(case, tested_dtype)
        expected = expect(case, x, weights)
        # A NaN that is read shows in the result; its bits show every write.
        size = 2 * BAND + _elements(x, weights)
        buffers = {
            d: torch.full((size,), torch.nan, dtype=d) for d in (tested_dtype, torch.float32)
        }
        x, weights = relocate(x, weights, carve(buffers))
        before = _bits(buffers)
        y = run(backend, x, weights, **case.settings)
        if not torch.equal(_bits(buffers), before):
            wrong[case.id] = "wrote to its inputs or beside them"
        elif reason := why_wrong(y, expected):
            wrong[case.id] = reason
    assert not wrong


def _bits(buffers: dict[torch.dtype, Tensor]) -> Tensor:
    return torch.cat([buffer.view(torch.uint8) for buffer in buffers.values()])


def _elements(x: Tensor, weights: FoldedWeights) -> int:
    tensors = [t for t in (x, *weights.tensors()) if t is not None]
    return sum(t.numel() + BAND for t in tensors)


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("group", cases.groups())
def test_what_fresh_memory_holds_does_not_matter(
    kernel_backend, tested_dtype, group, uninitialised_memory_is_nan
):
    for case in cases.groups()[group]:
        x, weights = make_inputs(case, tested_dtype)
        y = run(kernel_backend, x, weights, **case.settings)
        assert (reason := why_wrong(y, expect(case, x, weights))) is None, f"{case.id}: {reason}"


class Guarded:
    """Copies of tensors in read-only pages between two that no one may touch.

    `at_end` puts the last element before the upper of those pages, otherwise the first one after
    the lower.
    """

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self.maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        return self.place(tensor, tensor.numel()).view(tensor.shape)

    def place(self, tensor: Tensor, count: int) -> Tensor:
        """The first `count` elements from where `tensor` was copied to."""
        page = mmap.PAGESIZE
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // page) * page
        memory = mmap.mmap(-1, pages + 2 * page)
        self.maps.append(memory)
        offset = page + (pages - size if self.at_end else 0)
        memory[offset : offset + size] = tensor.flatten().view(torch.uint8).numpy().tobytes()
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for address, length, protection in (
            (start, page, 0),
            (start + page, pages, mmap.PROT_READ),
            (start + page + pages, page, 0),
        ):
            if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection):
                raise OSError(ctypes.get_errno(), "mprotect")
        return torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=count)


def cases_of(part: str) -> list[Case]:
    return [c for name, group in cases.groups().items() if name.startswith(part) for c in group]


def run_guarded(backend: str, part: str, dtype: str) -> None:
    for case in cases_of(part):
        x, weights = make_inputs(case, getattr(torch, dtype))
        expected = expect(case, x, weights)
        for at_end in (True, False):
            print(case.id, "guarded", "behind" if at_end else "before", flush=True)
            guarded = Guarded(at_end)
            y = run(backend, *relocate(x, weights, guarded), **case.settings)
            assert (reason := why_wrong(y, expected)) is None, reason


def run_on_guarded_heap(backend: str, part: str, dtype: str) -> None:
    torch.set_num_threads(3)
    for case in cases_of(part):
        x, weights = make_inputs(case, getattr(torch, dtype))
        for layout, memory_format in LAYOUTS.items():
            print(case.id, layout, flush=True)
            y = run(backend, x.contiguous(memory_format=memory_format), weights, **case.settings)
            assert y.numel() == 0 or (y.data_ptr() + y.nbytes) % mmap.PAGESIZE == 0, "unguarded"


def write_past_a_result() -> None:
    result = torch.ones(1001)
    print("writing one element more", flush=True)
    ctypes.memset(result.data_ptr() + result.nbytes, 0, 4)


def read_past_the_end() -> None:
    tensor = torch.ones(1000)
    assert Guarded(True).place(tensor, 1000).sum() == 1000
    print("reading one element more", flush=True)
    Guarded(True).place(tensor, 1001).sum()


def write_to_an_input() -> None:
    print("writing", flush=True)
    Guarded(True)(torch.ones(1000)).zero_()


def check_child(done: subprocess.CompletedProcess, part: str) -> None:
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    assert len(printed) == 2 * len(cases_of(part))


def check_caught(done: subprocess.CompletedProcess) -> None:
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert done.returncode == -signal.SIGSEGV, f"exit {done.returncode}: {done.stderr}"


# float16 goes the ways of a bfloat16 that is not multiplied in pairs.
@pytest.mark.parametrize(
    "part, dtype",
    [
        *[(part, dtype) for part in ("S1", "S2", "S3", "S4") for dtype in ("float32", "bfloat16")],
        ("S4", "float16"),
    ],
)
def test_guard_pages_around_the_inputs(python, kernel_backend, part, dtype):
    check_child(python(__file__, "run_guarded", kernel_backend, part, dtype), part)


@pytest.mark.parametrize("fault", ["read_past_the_end", "write_to_an_input"])
def test_guard_pages_catch(python, fault):
    check_caught(python(__file__, fault))


@pytest.mark.parametrize("part, dtype", [("S", "float32"), ("S", "bfloat16"), ("S4", "float16")])
def test_guard_pages_behind_everything_allocated(python, kernel_backend, guarded_heap, part, dtype):
    arguments = ("run_on_guarded_heap", kernel_backend, part, dtype)
    check_child(python(__file__, *arguments, **guarded_heap), part)


def test_the_guarded_heap_catches(python, guarded_heap):
    check_caught(python(__file__, "write_past_a_result", **guarded_heap))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
