"""What importing and calling leave alone in a process, how processes and threads end, and every
instruction set.

Each check runs in a child process: `python test_process.py FUNCTION`.
"""

import ctypes
import multiprocessing
import os
import platform
import random
import sys
import threading
import warnings

import pytest
import torch

# Values of ATEN_CPU_CAPABILITY, and names of the kernels that they select.
CAPABILITIES = ("default", "avx2", "avx512")
pytestmark = pytest.mark.usefixtures("kernel_backend")


def control_word() -> int | None:
    """Rounding, flushing and trapping of SSE arithmetic: MXCSR without its status flags."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment[7] & ~0x3F


def state() -> dict:
    """What a library has no business changing."""
    denormal = torch.full((1 << 17,), 1e-40)
    return {
        "control word": control_word(),
        "denormals kept in every thread": bool((denormal * 0.5 > 0).all()),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "Python's random numbers": random.getstate(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "exception hook": sys.excepthook,
    }


def differences(before: dict) -> list[str]:
    return [name for name, value in state().items() if value != before[name]]


def import_and_call() -> None:
    torch.set_num_threads(2)
    before = state()
    assert before["denormals kept in every thread"]
    import mnv2_kernels

    print("after import:", differences(before))
    import cases

    assert sys.modules["mnv2_kernels"] is mnv2_kernels
    inputs = [(case, *cases.make_inputs(case)) for case in cases.groups()["S1-width1"]]
    torch.set_rng_state(torch.tensor(before["torch's random numbers"], dtype=torch.uint8))
    for backend in cases.kernel_backends():
        for case, x, weights in inputs:
            cases.run(backend, x, weights, **case.settings)
        print(f"after calls on {backend}:", differences(before))


def bits_of_bfloat16() -> None:
    import mnv2_kernels as mk

    torch.manual_seed(0)
    block = mk.InvertedResidual(16, 24).eval().bfloat16()
    with torch.inference_mode():
        print(block(torch.randn(1, 16, 9, 9).bfloat16()).view(torch.int16).flatten().tolist())


def selected_kernel() -> None:
    import cases

    from mnv2_kernels import _C

    print(next(kernel["name"] for kernel in _C.cpu_kernels() if kernel["selected"]))
    count = 0
    for group in ("S1-width1", "S1-lite0", "S2", "S4"):
        for case in cases.groups()[group]:
            x, weights = cases.make_inputs(case)
            y = cases.run("cpu", x, weights, **case.settings)
            if reason := cases.why_wrong(y, cases.expect(case, x, weights)):
                print(case.id, reason)
            count += 1
    print(count)


def fork_after_calls() -> None:
    import cases

    torch.set_num_threads(4)
    case = cases.groups()["S1-width1"][3]
    x, weights = cases.make_inputs(case)
    y = cases.run("cpu", x, weights, **case.settings)
    child = os.fork()
    if child == 0:
        # As torch's own worker processes: threads do not survive a fork.
        torch.set_num_threads(1)
        again = cases.run("cpu", x, weights, **case.settings)
        os._exit(0 if torch.equal(again, y) else 3)
    _, status = os.waitpid(child, 0)
    again = cases.run("cpu", x, weights, **case.settings)
    print(status, torch.equal(again, y))


def call_once(_=None) -> torch.Tensor:
    import cases

    case = cases.groups()["S1-width1"][3]
    x, weights = cases.make_inputs(case)
    return cases.run("cpu", x, weights, **case.settings)


class Images(torch.utils.data.Dataset):
    """Each is the result of a call in a worker's process."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, _: int) -> torch.Tensor:
        return call_once()


def workers_of_a_loader() -> None:
    torch.set_num_threads(4)
    y = call_once()
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            Images(), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=120
        )
        for batch in loader:
            print(context, all(torch.equal(image, y) for image in batch))


def spawned_processes() -> None:
    y = call_once()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for result in pool.map_async(call_once, range(4)).get(timeout=120):
            print(torch.equal(result, y))


def threads_of_a_call() -> None:
    import mnv2_kernels as mk

    torch.set_num_threads(1)
    x, weights = torch.randn(6, 16, 28, 28), mk.fold(mk.InvertedResidual(16, 24).eval())
    y = mk.inverted_residual(x, weights, backend="cpu")
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)
    again = mk.inverted_residual(x, weights, backend="cpu")
    print(before, len(os.listdir("/proc/self/task")), torch.equal(again, y))


def threads_that_end() -> None:
    torch.set_num_threads(2)
    right, unequal, counts = call_once(), [], []

    def call() -> None:
        torch.set_num_threads(2)
        if not torch.equal(call_once(), right):
            unequal.append(1)

    for number in range(60):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        if number in (9, 59):
            counts.append(len(os.listdir("/proc/self/task")))
    print(len(unequal), counts[1] - counts[0])


def test_import_and_calls_leave_the_process_alone(python):
    done = python(__file__, "import_and_call")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) >= 2, done.stderr
    assert all(line.endswith(": []") for line in lines), lines


def test_a_difference_would_be_seen():
    before = state()
    torch.rand(1)
    warnings.simplefilter("ignore")
    assert differences(before) == ["torch's random numbers", "warnings"]
    before = state()
    if torch.set_flush_denormal(True):
        seen = differences(before)
        torch.set_flush_denormal(False)
        assert "denormals kept in every thread" in seen
        assert before["control word"] is None or "control word" in seen


@pytest.mark.parametrize("name", CAPABILITIES)
def test_every_instruction_set(python, name):
    from mnv2_kernels import _C

    kernels = {kernel["name"]: kernel for kernel in _C.cpu_kernels()}
    assert kernels.keys() <= set(CAPABILITIES)
    if name not in kernels or not kernels[name]["available"]:
        pytest.skip(f"no {name} here")
    done = python(__file__, "selected_kernel", ATEN_CPU_CAPABILITY=name)
    assert done.returncode == 0, done.stderr
    selected, *wrong, count = done.stdout.splitlines()
    assert selected == name and not wrong and int(count) >= 200


def test_the_best_kernel_is_selected_unasked():
    from mnv2_kernels import _C

    kernels = _C.cpu_kernels()
    assert [kernel["selected"] for kernel in kernels].count(True) == 1
    best = torch.backends.cpu.get_cpu_capability().lower()
    expected = best if best in CAPABILITIES else "default"
    assert next(kernel["name"] for kernel in kernels if kernel["selected"]) == expected
    assert next(kernel["name"] for kernel in kernels if kernel["available"]) == expected


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="no /proc on this system")
def test_bfloat16_in_pairs_as_asked(python):
    """Pairs round the results of the depthwise; unasked, they are for AMD's CPUs."""
    from mnv2_kernels import _C

    with open("/proc/cpuinfo") as file:
        cpu = file.read()
    selected = next(kernel["name"] for kernel in _C.cpu_kernels() if kernel["selected"])
    results = {}
    for asked in ("1", "0", ""):
        done = python(__file__, "bits_of_bfloat16", MNV2_BFLOAT16_PAIRS=asked)
        assert done.returncode == 0, done.stderr
        results[asked] = done.stdout
    assert (results["1"] != results["0"]) == (selected == "avx512" and "avx512_bf16" in cpu)
    assert results[""] == results["1" if "AuthenticAMD" in cpu else "0"]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc on this system")
def test_calls_run_on_torchs_threads(python):
    """As many as torch has been told, started by the first call that shares out its work."""
    before, after, equal = python(__file__, "threads_of_a_call").stdout.split()
    assert int(after) - int(before) == 2 and equal == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork(python):
    done = python(__file__, "fork_after_calls")
    assert done.stdout.split() == ["0", "True"], (done.returncode, done.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_loader(python):
    done = python(__file__, "workers_of_a_loader")
    assert done.stdout.split() == ["fork", "True"] * 3 + ["spawn", "True"] * 3, done.stderr


def test_spawned_processes(python):
    done = python(__file__, "spawned_processes")
    assert done.stdout.split() == ["True"] * 4, (done.returncode, done.stderr)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc on this system")
def test_threads_that_end_leave_none_behind(python):
    done = python(__file__, "threads_that_end")
    unequal, more = map(int, done.stdout.split())
    # Of fifty threads; one that was joined may not be gone yet.
    assert unequal == 0 and more < 5, done.stderr


def test_processes_end(python):
    import cases

    count = 50 if cases.LONG else 5
    for number in range(count):
        done = python(__file__, "import_and_call")
        assert done.returncode == 0 and not done.stderr, (number, done.returncode, done.stderr)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
