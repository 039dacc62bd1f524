"""Parts `tests` and `sanitizer` of the GPU suite, which cannot pass by running nothing."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ..machine import ROOT
from .part import NO_TIME, Context, Failed
from .sanitized import CALLS

# What each tool prints when all is well.
SUMMARIES = {
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)",
    "initcheck": r"ERROR SUMMARY: 0 errors",
    "synccheck": r"ERROR SUMMARY: 0 errors",
}
OPTIONS = {"memcheck": ["--padding", "2048"]}
SCRIPT = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
TAIL = 3000
# Of no use on the device: one is interpreted by design, one compiles for other GPUs for minutes.
LEFT_OUT = ("test_triton_interpreted_mutants.py", "test_triton_code.py")
# Left to a part to write its rows in, what its process took to start included.
END_SECONDS = 15
# What is said of a test; the last of these counts where several are.
OUTCOMES = ("unfinished", "passed", "skipped", "failed")


def child(
    command: list[str], seconds: float, *, stream: bool = False, **variables: str
) -> tuple[int | None, str]:
    """(exit code, output) of a command with its whole family ended after that time.

    The exit code is None where time ran out; the output of `stream` goes where ours goes. Triton's
    own interpreter switch is taken away.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=None if stream else output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()


def run_tests(context: Context) -> None:
    """Suite `gpu_tests`: `device_files()` on the device; a dry run collects them alone.

    Where time runs out, the row has what was known by then.

    Raises:
        Failed: a test failed, none ran, a kernel never ran on the device, or the interpreter ran
            in a test whose name does not say so.
    """
    files = device_files()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    if context.dry_run:
        code, output = child([*command, "--collect-only"], context.left())
        context.keep([{"suite": "gpu_tests", "exit_code": code, "output": output[-TAIL:]}])
        return
    command += ["-p", "benchmarks.gpu.device_tests"]
    rounds = [[]]
    if importlib.util.find_spec("xdist"):
        # What needs most of the memory runs alone.
        rounds = [["-n", "8", "-m", "not serial"], ["-m", "serial"]]
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
    paths = [*ROOT.glob("tests/triton/test_*.py"), ROOT / "tests/cuda/test_cuda_gpu.py"]
    return sorted(str(path) for path in paths if path.name not in LEFT_OUT)


def kept(folder: Path) -> tuple[dict[str, str], Counter]:
    """(outcome by test, launches by place) from the files of the plugin `device_tests`."""
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


def run_sanitizer(context: Context) -> None:
    """Suite `gpu_sanitizer`: a seeded bug that must be found, then our kernels under every tool.

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
    scripts = {name: [*SCRIPT, "--backend", name] for name in CALLS}
    wrong = []
    for name, script in list(scripts.items()):
        # Compiles what Triton has not yet, so that no tool has to wait for that.
        code, output = child(script, context.left())
        if code != 0:
            row = {"suite": "gpu_sanitizer", "tool": None, "backend": name, "exit_code": code}
            context.keep([row | {"output": output[-TAIL:]}])
            wrong.append(f"{name}: the script must pass without a tool, it ended with {code}")
            del scripts[name]
    runs = [("memcheck", None, [*SCRIPT, "--seeded-bug"])] if scripts else []
    runs += [(tool, name, script) for tool in SUMMARIES for name, script in scripts.items()]
    for i, (tool, name, script) in enumerate(runs):
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
            reason = found_nothing(tool, code, output, calls=len(CALLS[name]))
        row = {"suite": "gpu_sanitizer", **labels, "exit_code": code, "passed": reason is None}
        row["calls"] = len(CALLS[name]) if name else 1
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
