"""Set-up shared by all tests."""

import os
import platform
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

# What they assert is explained when it fails, as in a test.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("helpers/*.py")))

import cases  # noqa: E402
import torchvision_first  # noqa: E402, F401


def pytest_generate_tests(metafunc):
    """`backend` is every backend to test here, `kernel_backend` every one but the reference.

    With one of them, `tested_dtype` is every dtype to test it in.
    """
    for name in {"backend", "kernel_backend"}.intersection(metafunc.fixturenames):
        tested = cases.backends() if name == "backend" else cases.kernel_backends()
        if "tested_dtype" in metafunc.fixturenames:
            pairs = [(backend, dtype) for backend in tested for dtype in cases.dtypes(backend)]
            metafunc.parametrize(
                (name, "tested_dtype"), pairs, ids=lambda v: str(v).removeprefix("torch.")
            )
        else:
            metafunc.parametrize(name, tested)


def pytest_collection_modifyitems(config, items):
    """Of each test that is marked as sampled, the short form runs a share of the cases, always the
    same, and at least one."""
    if cases.LONG:
        return
    kept, left_out, seen = [], [], set()
    for item in items:
        mark, test = item.get_closest_marker("sampled"), item.nodeid.partition("[")[0]
        share = 1 if mark is None or test not in seen else mark.args[0]
        seen.add(test)
        (left_out if zlib.crc32(item.nodeid.encode()) % share else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """The test begins and ends with nothing compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread():
    """For so little work that waiting for a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def guarded_heap(tmp_path_factory):
    """The variables of a process whose heap is guard_malloc.c."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if platform.libc_ver()[0] != "glibc" or compiler is None:
        pytest.skip("needs glibc and a C compiler")
    library = tmp_path_factory.mktemp("heap") / "guard_malloc.so"
    source = Path(__file__).parent / "helpers" / "guard_malloc.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.fixture
def watch(monkeypatch):
    """Calls a model, and says what has run."""
    from whole_networks import Watch

    return Watch(monkeypatch)


@pytest.fixture(params=["own", "torchvision", "timm", "mnasnet", "lukemelas"])
def pair(request):
    """(a plain block, the same block fused) of one family."""
    import fused_pairs

    return fused_pairs.make_pair(request.param)


@pytest.fixture
def python():
    """Runs a child Python, which finds the same modules, with these arguments and variables."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
        command = [sys.executable, "-W", "ignore", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run
