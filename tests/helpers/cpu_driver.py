"""The CPU kernels without torch: cpu_alone/driver.cpp, compiled for a machine or a sanitizer.

    driver = cpu_driver.build(["avx2"], cpu_driver.ADDRESS)
    outcome = cpu_driver.run(driver, "avx2", "random", "7", "100")
    assert not outcome.found

What the driver finds wrong is printed by kind: `numbers` (against float64), `NaN` (at another place
than there), `bits` (other ones with other threads or streams), `margins` (written outside).
A signal or a sanitizer's report is a kind too.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Case

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build/cpu_alone"
DRIVER = "tests/cpu_alone/driver.cpp"
# Included ahead of every source.
AHEAD = ("tests/cpu_alone/masked_lanes.h",)
# What every driver consists of, and what each kernel adds.
SHARED = ("kernels", "network", "run_block", "schedule", "backward")
KERNEL_FILES = {
    "avx512": ("isa/avx512", "isa/backward_avx512"),
    "avx2": ("isa/avx2", "isa/backward_avx2"),
    "default": ("isa/generic", "isa/backward_generic"),
    "neon": ("isa/neon", "isa/backward_generic"),
}
# Names of the tables' rows, so that a driver of one kernel can give all of them to it.
SYMBOLS = {"avx512": "Avx512", "avx2": "Avx2", "default": "Generic"}

_WATCHED = ("-O1", "-g1", "-fPIC")
UNDEFINED = "undefined,float-cast-overflow,float-divide-by-zero"
ADDRESS = (*_WATCHED, f"-fsanitize=address,{UNDEFINED}", "-fno-sanitize-recover=all")
THREADS = (*_WATCHED, "-fsanitize=thread")
# What a sanitizer's report begins with.
REPORTS = {
    "address": "ERROR: AddressSanitizer",
    "undefined": "runtime error:",
    "race": "WARNING: ThreadSanitizer: data race",
}
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def why_not(flags: Sequence[str] = ()) -> str | None:
    """Why no driver with these flags can be built here, or None."""
    if platform.system() != "Linux":
        return "the driver needs Linux"
    if shutil.which("g++") is None:
        return "the driver needs g++"
    for name in {"address": ("libasan.so",), "thread": ("libtsan.so",)}.items():
        wanted = any(f"-fsanitize={name[0]}" in flag for flag in flags)
        if wanted and not all(map(library, name[1])):
            return f"g++ has no {name[1][0]}"
    return None


def library(name: str) -> str | None:
    """Where a library of the compiler is, or None."""
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def kernels_here() -> list[str]:
    """Of this machine, best first."""
    if platform.machine() in ("aarch64", "arm64"):
        return ["neon"]
    all_of_them = ["avx512", "avx2", "default"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    return all_of_them[all_of_them.index(best) :] if best in all_of_them else ["default"]


def build(
    kernels: Sequence[str],
    flags: Sequence[str],
    texts: Mapping[str, str] | None = None,
    compiler: str = "g++",
) -> Path:
    """Compile and link; returns the program. What was built from the same text is taken again.

    texts: what to compile instead of the text of some sources, by their path in the repository.
    """
    parts = objects(kernels, flags, texts, compiler, [DRIVER])
    command = [compiler, *flags, *map(str, parts), *aliases(kernels), "-pthread"]
    program = CACHE / f"driver-{_key(*command)}" / "driver"
    program.parent.mkdir(exist_ok=True)
    _make(program, lambda to: [*command, "-o", to])
    return program


def objects(
    kernels: Sequence[str],
    flags: Sequence[str],
    texts: Mapping[str, str] | None = None,
    compiler: str = "g++",
    more: Sequence[str] = (),
) -> list[Path]:
    """Of the kernels, and of `more` sources in the repository, which are compiled ahead."""
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in _sources()}
    assert (texts or {}).keys() <= sources.keys()
    sources |= texts or {}
    tree = CACHE / f"sources-{_key(*sources, *sources.values())}"
    for name, text in sources.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        _make(tree / name, text)
    # What the kernels see of the driver.
    seen = [text for name, text in sources.items() if name.startswith("csrc") or name in AHEAD]
    command = [compiler, "-std=c++20", "-Wall", *flags]
    names = dict.fromkeys(SHARED + sum((KERNEL_FILES[kernel] for kernel in kernels), ()))

    def compile_one(file: str) -> Path:
        depends = seen if file.startswith("csrc") else sources.values()
        made = CACHE / f"{Path(file).stem}-{_key(file, *command, *depends)}.o"
        ahead = [f"-include{tree / name}" for name in AHEAD]
        _make(made, lambda to: [*command, *ahead, "-c", str(tree / file), "-o", to])
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, [*more, *(f"csrc/cpu/{name}.cpp" for name in names)]))


def _sources() -> list[Path]:
    folders = (ROOT / "csrc/cpu", ROOT / "tests/cpu_alone")
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [ROOT / "csrc/block.h", *files]


def _key(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _make(path: Path, content: str | Callable[[str], list[str]]) -> None:
    """A file with this text, or made by this command; once, whichever process comes first."""
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        part = path.with_name(f"{path.name}.part")
        if isinstance(content, str):
            part.write_text(content)
        else:
            made = subprocess.run(content(str(part)), capture_output=True, text=True)
            assert made.returncode == 0, made.stderr[-3000:]
        os.replace(part, path)


def aliases(kernels: Sequence[str]) -> list[str]:
    """For the linker: the names of kernels that are left out are other names of the last one."""
    if kernels[-1] not in SYMBOLS:
        return []

    def mangled(kernel: str, kind: str) -> str:
        name = f"k{SYMBOLS[kernel]}{kind}"
        return f"_ZN4mnv23cpu{len(name)}{name}E"

    missing = SYMBOLS.keys() - set(kernels)
    return [
        f"-Wl,--defsym={mangled(kernel, kind)}={mangled(kernels[-1], kind)}"
        for kernel in sorted(missing)
        for kind in ("Kernel", "Backward")
    ]


@dataclass(frozen=True)
class Outcome:
    """Of one run: the counts that the driver printed, and the kinds of faults that were found."""

    counts: dict[str, int]
    found: frozenset[str]
    printed: str
    errors: str


def run(
    driver: Path | Sequence[str | Path],
    *arguments: str,
    cases: Iterable[str] = (),
    **variables: str,
) -> Outcome:
    """driver: the program, or a command that ends with it. Its folder is the working directory.

    bfloat16 is multiplied in pairs wherever there are instructions for that.
    """
    command = [driver] if isinstance(driver, Path) else list(driver)
    done = subprocess.run(
        [*command, *arguments],
        input="".join(f"{line}\n" for line in cases),
        env=os.environ | {"MNV2_BFLOAT16_PAIRS": "1"} | variables,
        cwd=Path(command[-1]).parent,
        capture_output=True,
        text=True,
    )
    found = set(re.findall(r"^wrong: (\w+)$", done.stdout, re.M))
    found |= {kind for kind, words in REPORTS.items() if words in done.stderr}
    if done.returncode < 0:
        found.add(signal.Signals(-done.returncode).name)
    assert found or done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    last = done.stdout.splitlines()[-1:]
    counts = {n: int(c) for n, c in re.findall(r"(\S+) (\d+)", last[0])} if last else {}
    return Outcome(counts, frozenset(found), done.stdout, done.stderr)


def line_of(case: Case, dtype: torch.dtype, number: int) -> str:
    """A case as the driver's `cases` reads it: one image; NaN, schedules and places in turn."""
    config = case.config
    top, left, bottom, right = config.padding
    fields = [
        *(config.in_channels, config.hidden_channels, config.out_channels),
        *(config.expansion, config.residual, case.height, case.width),
        *(config.kernel_size, config.stride, config.dilation, top, left, bottom, right),
        *(ELEMENTS[dtype], sum(b << i for i, b in enumerate(case.biases))),
        *(number // 2 % 2, number % 11 // 8, number % 7 == 3, number % 2),
        *(bound for clip in case.clips for bound in clip),
    ]
    return " ".join(str(int(f) if isinstance(f, bool) else f) for f in fields)
