"""Parts `build`, `tests` and `sanitizer` of the GPU suite, which cannot pass by running nothing.

This file is also a pytest plugin (`-p benchmarks.gpu.checks`). It records the outcome of each test
and where kernels ran. Every test process writes two files to the folder in MNV2_DEVICE_TESTS while
tests start and end, so that its records survive it: PID.outcomes has a line of outcome and id for
each test, PID.json the launches by place.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

import torch
from triton import knobs

from mnv2_kernels.ops.inverted_residual import _ops
from mnv2_kernels.ops.triton import interpreter

from ..machine import ROOT
from .part import NO_TIME, Context, Failed, child
from .sanitized import CALLS

JOBS = 16
LOADED = """
from mnv2_kernels.ops.extension import cuda_missing, module
assert cuda_missing is None, cuda_missing
print("CUDA", module.build_info()["cuda"])
"""
# What each tool prints when all is well.
SUMMARIES = {
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)",
    "initcheck": r"ERROR SUMMARY: 0 errors",
    "synccheck": r"ERROR SUMMARY: 0 errors",
}
OPTIONS = {"memcheck": ["--padding", "2048"]}
# Tools that take a hundred times as long as the kernels get one call of so many.
EVERY = {"racecheck": 6}
SCRIPT = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
TAIL = 3000
FIRST = "test_cuda_gpu.py"
DEVICE_TESTS = ("test_triton*.py", FIRST)
# Of no use on the device: one is interpreted by design, one compiles for other GPUs for minutes.
LEFT_OUT = ("test_triton_interpreted_mutants.py", "test_triton_code.py")
# Left to a part to write its rows in, what its process took to start included.
END_SECONDS = 15
# What is said of a test; the last of these counts where several are.
OUTCOMES = ("unfinished", "passed", "skipped", "failed")

launches: Counter[str] = Counter()


def run_build(context: Context) -> None:
    """Suite `gpu_build`: how long it took, and what was built.

    Raises:
        Failed: a compiler failed, which the sentence ends with; time ran out; or the extension
            cannot be loaded.
    """
    if context.dry_run:
        context.skip("gpu_build", "no GPU")
        return
    start = perf_counter()
    code, output = child(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        context.left(),
        # ninja, without which the files are compiled one after another, is in Python's folder.
        PATH=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        MAX_JOBS=str(JOBS),
        MNV2_KERNELS_SKIP_CPP="0",
        TORCH_CUDA_ARCH_LIST="{}.{}".format(*torch.cuda.get_device_capability()),
        MNV2_KERNELS_FORCE_BUILD="1",
        MNV2_KERNELS_CUDA="1",
    )
    seconds = perf_counter() - start
    row = {"suite": "gpu_build", "exit_code": code, "build_seconds": seconds}
    if code != 0:
        context.keep([row | {"output": output[-TAIL:]}])
        ended = "its time was over" if code is None else f"it ended with {code}"
        raise Failed(f"build: {ended}:\n{said_last(output)}")
    code, output = child([sys.executable, "-c", LOADED], context.left())
    context.keep([row | {"loaded": code == 0, "output": output[-TAIL:]}])
    if code != 0:
        raise Failed(f"build: the extension cannot be loaded:\n{said_last(output)}")
    print(f"build: {seconds:.0f} s, {output.splitlines()[-1]}", flush=True)


def said_last(output: str, most: int = 20) -> str:
    """The lines of a build's output that say what is wrong, the last ones where none does."""
    lines = output.splitlines()
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    # A build ends with errors that only name the command that failed.
    return "\n".join(line[:400] for line in (errors[:most] or lines[-most:]))


def run_tests(context: Context) -> None:
    """Suite `gpu_tests`: `device_files()` on the device; a dry run collects them alone.

    Where time runs out, the row has what was known by then.

    Raises:
        Failed: a test failed, none ran, a kernel never ran on the device, or the interpreter ran
            in a test whose name does not say so.
    """
    files = device_files()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if context.dry_run:
        code, output = child([*command, *files, "--collect-only"], context.left())
        context.keep([{"suite": "gpu_tests", "exit_code": code, "output": output[-TAIL:]}])
        return
    command += ["-p", "benchmarks.gpu.checks"]
    # First what matters most and compiles nothing.
    first = [file for file in files if Path(file).name == FIRST]
    rounds = []
    for some in (first, [file for file in files if file not in first]):
        # What needs most of the memory runs alone.
        at_once = [["-n", "8", "-m", "not serial"], ["-m", "serial"]]
        rounds += [[*some, *o] for o in (at_once if importlib.util.find_spec("xdist") else [[]])]
    code, output = 0, ""
    with tempfile.TemporaryDirectory() as folder:
        for options in rounds:
            if code is None:
                break
            ended, said = child(
                [*command, *options],
                context.left() - END_SECONDS,
                MNV2_DEVICE_TESTS=folder,
                # The device machine need not have a compiler for the CPU's kernels.
                MNV2_KERNELS_SKIP_CPP="1",
            )
            code, output = None if ended is None else code or ended, output + said
        tests, launches = kept(Path(folder))
    counts = count(tests)
    wrong = complaints(code, counts, launches)
    row = {"suite": "gpu_tests", "exit_code": code, **counts}
    for outcome in ("failed", "unfinished"):
        row[f"{outcome}_tests"] = [name for name, of in tests.items() if of == outcome][:20]
    row |= {"device_launches": launches["device"], "cuda_calls": launches["cuda"]}
    row["complaints"] = wrong
    context.keep([row | ({"output": output[-TAIL:]} if wrong else {})])
    ran = f"{launches['device']} Triton kernels and {launches['cuda']} CUDA kernels ran"
    print(f"tests: {counts}, {ran}", flush=True)
    if wrong:
        raise Failed("tests: " + "; ".join(wrong))


def device_files() -> list[str]:
    """The tests for the device: what needs none would take time from the others."""
    paths = [p for name in DEVICE_TESTS for p in ROOT.glob(f"tests/**/{name}")]
    return sorted(str(path) for path in paths if path.name not in LEFT_OUT)


def kept(folder: Path) -> tuple[dict[str, str], Counter]:
    """(outcome by test, launches by place) from the files of the plugin."""
    tests = {}
    for path in folder.glob("*.outcomes"):
        for line in path.read_text().splitlines():
            outcome, _, name = line.partition(" ")
            tests[name] = max(outcome, tests.get(name, OUTCOMES[0]), key=OUTCOMES.index)
    launches = Counter()
    for path in folder.glob("*.json"):
        launches.update(json.loads(path.read_text()))
    return tests, launches


def count(tests: dict[str, str]) -> dict[str, int]:
    """Tests by outcome."""
    return {outcome: list(tests.values()).count(outcome) for outcome in OUTCOMES}


def complaints(code: int | None, counts: dict[str, int], launches: Counter) -> list[str]:
    """Why a run of the tests proves nothing, or the opposite of what it should."""
    interpreted = [
        name
        for name in launches
        if name.startswith("interpreted: ") and "interpret" not in name.partition(": ")[2]
    ]
    found = {
        "ended: their time was over": code is None,
        f"pytest ended with {code}": code not in (0, None),
        f"{counts['failed']} failed": counts["failed"] > 0,
        "none passed": counts["passed"] == 0,
        "no Triton kernel ran on the device": launches["device"] == 0,
        "no CUDA kernel ran": launches["cuda"] == 0,
        f"the interpreter ran in {interpreted[:3]}": bool(interpreted),
    }
    return [sentence for sentence, wrong in found.items() if wrong]


def current_test() -> str:
    """Id of the test that runs."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]


def pytest_configure(config):
    interpret = interpreter.run

    def counted(*args, **kwargs):
        launches[f"interpreted: {current_test()}"] += 1
        return interpret(*args, **kwargs)

    interpreter.run = counted
    knobs.runtime.launch_enter_hook.add(count_launch)
    _ops["cuda"] = counting(_ops["cuda"])


def count_launch(metadata) -> None:
    launches["device"] += 1


def counting(op):
    """The op, with its calls by the backend `cuda` counted where they are not traced."""

    def call(*arguments):
        y = op(*arguments)
        if not torch.compiler.is_compiling():
            launches["cuda"] += 1
        return y

    return call


def file(ending: str) -> Path | None:
    folder = os.environ.get("MNV2_DEVICE_TESTS")
    return Path(folder, f"{os.getpid()}{ending}") if folder else None


def keep_outcome(outcome: str, test: str) -> None:
    if path := file(".outcomes"):
        with path.open("a") as lines:
            lines.write(f"{outcome} {test}\n")


def keep_launches() -> None:
    """Whole or not at all: the process may be ended at any time."""
    if path := file(".json"):
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(launches))
        unfinished.replace(path)


def pytest_runtest_logstart(nodeid, location):
    keep_outcome("unfinished", nodeid)


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        keep_outcome(report.outcome, report.nodeid)
    if report.when == "teardown":
        keep_launches()


def pytest_unconfigure(config):
    keep_launches()


def run_sanitizer(context: Context, backend: str) -> None:
    """Suite `gpu_sanitizer`: a seeded bug that must be found, then a backend under every tool.

    Raises:
        Failed: the tool is missing, misses the seeded bug, or finds something in ours.
    """
    if context.dry_run:
        context.skip("gpu_sanitizer", "no GPU")
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        context.skip("gpu_sanitizer", "no compute-sanitizer on this machine")
        raise Failed("sanitizer: compute-sanitizer must be on PATH or in /usr/local/cuda/bin")
    script = [*SCRIPT, "--backend", backend]
    # Compiles what Triton has not yet, so that no tool has to wait for that.
    code, output = child(script, context.left())
    if code != 0:
        row = {"suite": "gpu_sanitizer", "tool": None, "backend": backend, "exit_code": code}
        context.keep([row | {"output": output[-TAIL:]}])
        raise Failed(f"{backend}: the script must pass without a tool, it ended with {code}")
    wrong = []
    runs = [("memcheck", None, 1, [*SCRIPT, "--seeded-bug"])]
    for tool in SUMMARIES:
        every = EVERY.get(tool, 1)
        calls = len(CALLS[backend][::every])
        runs.append((tool, backend, calls, [*script, "--every", str(every)]))
    for i, (tool, name, calls, script) in enumerate(runs):
        labels = {"tool": tool, "backend": name, "seeded_bug": name is None}
        what = f"{tool} of {name or 'the seeded bug'}"
        if context.left() < 10:
            context.skip("gpu_sanitizer", NO_TIME, **labels)
            wrong.append(f"{what}: no time left")
            continue
        code, output = child(
            [sanitizer, "--tool", tool, "--error-exitcode", "1", *OPTIONS.get(tool, []), *script],
            context.left() / (len(runs) - i),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        if name is None:
            reason = found_the_bug(tool, code, output)
        else:
            reason = found_nothing(tool, code, output, calls=calls)
        row = {"suite": "gpu_sanitizer", **labels, "exit_code": code, "passed": reason is None}
        row["calls"] = calls
        context.keep(
            [row | ({} if reason is None else {"reason": reason, "output": output[-TAIL:]})]
        )
        print(f"{what}: {reason or 'as it must be'}", flush=True)
        if reason is not None:
            wrong.append(f"{what}: {reason}")
            if name is None:
                break
    if wrong:
        raise Failed("sanitizer: " + "; ".join(wrong))


def found_nothing(tool: str, code: int | None, output: str, *, calls: int) -> str | None:
    """None where a tool ran over every call and found nothing, otherwise what is amiss."""
    if code is None:
        return "it did not end in time"
    if code != 0:
        return f"it ended with {code}"
    if f"\n{calls} calls\n" not in f"\n{output}":
        return "not every call was made"
    return None if re.search(SUMMARIES[tool], output) else "its summary of 0 errors is missing"


def found_the_bug(tool: str, code: int | None, output: str) -> str | None:
    """None where a tool has reported the store out of bounds, otherwise what is amiss."""
    if code in (0, None):
        return f"the seeded bug must give an exit code, got {code}"
    seen = re.search(r"Invalid __global__ write", output)
    return None if seen else "the seeded bug must be reported as a write out of bounds"
