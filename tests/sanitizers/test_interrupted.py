"""Calls that cannot end as they should: memory that is refused in them, and Ctrl-C.

Each check runs in a child process: `python test_interrupted.py FUNCTION`. refuse_memory.cpp,
preloaded into it, refuses one allocation after the other: C++'s of the extension, also those of
threads of a parallel region, and the memory of tensors.
"""

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
from torch import Tensor

from mnv2_kernels.block.config import BlockConfig

KINDS = {"C++": 0, "tensor": 1}


def code_of_the_extension() -> tuple[int, int]:
    """Where it is in memory."""
    from mnv2_kernels import _C

    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [m[0].split("-") for m in maps if m[-1] == str(Path(_C.__file__).resolve())]
    addresses = [int(address, 16) for pair in ranges for address in pair]
    return min(addresses), max(addresses)


def calls() -> dict[str, Callable[[], list[Tensor]]]:
    """A call of every op that is written in C++."""
    import mnv2_kernels as mk

    made = {}
    for name, dtype in (("block", torch.float32), ("16-bit block", torch.bfloat16)):
        case = cases.groups()["S1-width1"][3]
        x, weights = cases.make_inputs(replace(case, batch=2), dtype)
        made[name] = lambda x=x, w=weights, s=case.settings: [cases.run("cpu", x, w, **s)]
    groups = cases.groups()["S1-width1"][-1]
    x, weights = cases.make_inputs(groups)
    made["two groups"] = lambda: [cases.run("cpu", x, weights, **groups.settings)]
    leaf = x.clone().requires_grad_()
    made["gradients"] = lambda: list(
        torch.autograd.grad(cases.run("cpu", leaf, weights, **groups.settings).sum(), leaf)
    )
    plan = mk.plan(mk.mobilenet_v2(0.35).eval(), (3, 64, 75))
    pixels = torch.randn(1, 3, 64, 75)
    made["plan"] = lambda: [plan(pixels)]
    return made


def refuse_all() -> None:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.refuse.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_size_t]
    begin, end = code_of_the_extension()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for name, call in calls().items():
            right = call()
            for kind, number in KINDS.items():
                refusals = [0, 0, 0]
                while refusals[0] == 0:
                    print("refusing", name, kind, sum(refusals), "with", threads, flush=True)
                    error = None
                    library.refuse(number, sum(refusals), begin, end)
                    try:
                        y = call()
                    except (MemoryError, RuntimeError) as raised:
                        error = raised
                    who = library.refused()
                    refusals[who] += 1
                    assert (error is None) == (who == 0), repr(error)
                    assert all(map(torch.equal, y if who == 0 else call(), right))
                print("refused:", name, kind, threads, *refusals[1:], flush=True)


def interrupt() -> None:
    case = cases.Case(BlockConfig(64, 384, 64), 56, 56, batch=32)
    x, weights = cases.make_inputs(case)
    x = x.contiguous(memory_format=torch.channels_last)
    y = cases.run("cpu", x, weights, **case.settings)
    # As Ctrl-C, but at a moment that no other thread of Python has to find.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    begin, computed = time.perf_counter(), time.process_time()
    cases.run("cpu", x, weights, **case.settings)
    usual, computed = time.perf_counter() - begin, time.process_time() - computed
    begin = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_REAL, usual / 4)
        cases.run("cpu", x, weights, **case.settings)
        print("not interrupted")
    except KeyboardInterrupt:
        # The call is over by then: nothing still runs unseen.
        complete = time.process_time() - begin > computed / 2
        again = cases.run("cpu", x, weights, **case.settings)
        print("interrupted", complete, torch.equal(again, y))


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """The variables of a process whose memory can be refused."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if platform.libc_ver()[0] != "glibc" or compiler is None:
        pytest.skip("needs glibc and a C++ compiler")
    library = tmp_path_factory.mktemp("memory") / "refuse_memory.so"
    source = Path(__file__).with_name("refuse_memory.cpp")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.mark.usefixtures("kernel_backend")
def test_refused_memory_is_an_error_and_the_next_call_is_right(python, refusing):
    done = python(__file__, "refuse_all", **refusing)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {lines[-1:]}\n{done.stderr[-3000:]}"
    results = [line.split()[1:] for line in lines if line.startswith("refused:")]
    assert len(results) == 20
    counts = {tuple(words[:-2]): tuple(map(int, words[-2:])) for words in results}
    for (*name, kind, threads), (own, others) in counts.items():
        assert own > 0, (name, kind, threads)
        # What a network's threads keep of their rows; a block's threads ask for nothing.
        in_threads = name == ["plan"] and kind == "C++" and threads == "3"
        assert (others > 0) == in_threads, (name, kind, threads, others)


@pytest.mark.usefixtures("kernel_backend")
def test_an_interrupt_is_raised_behind_the_call(python):
    assert python(__file__, "interrupt").stdout.split() == ["interrupted", "True", "True"]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
