"""Build the package with its one compiled extension, or without it where that cannot be built.

Environment: MNV2_KERNELS_SKIP_CPP=1 leaves the extension out, MNV2_KERNELS_FORCE_BUILD=1 makes a
failing compiler an error, DEBUG=1 builds for a debugger.
"""

import hashlib
import os
import sys
from pathlib import Path

from setuptools import setup

CPU_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/host.cpp",
    "csrc/ops_cpu.cpp",
    "csrc/cpu/kernels.cpp",
    "csrc/cpu/schedule.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/generic.cpp",
]


GENERATED = Path("build/generated")


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") == "1"


def source_hash() -> str:
    """Identifies the sources that a build came from; tests compare it with the checkout."""
    digest = hashlib.sha256()
    for path in sorted(Path("csrc").rglob("*")):
        if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"):
            digest.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_source_hash() -> None:
    """A header and not a macro: a change of one file then compiles that file, not all of them."""
    header = GENERATED / "source_hash.h"
    text = f'#define MNV2_SOURCE_HASH "{source_hash()}"\n'
    if not header.exists() or header.read_text() != text:
        GENERATED.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


def extension() -> dict:
    """The setup() arguments that build mnv2_kernels._C; none where torch is not there to build."""
    if enabled("MNV2_KERNELS_SKIP_CPP"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"mnv2_kernels: building without the extension: {error}", file=sys.stderr)
        return {}

    class OptionalBuildExtension(BuildExtension):
        """A missing or failing compiler costs the fast kernels, not the installation."""

        def run(self):
            try:
                write_source_hash()
                super().run()
            except Exception as error:
                if enabled("MNV2_KERNELS_FORCE_BUILD"):
                    raise
                self.extensions = []
                print(f"mnv2_kernels: the extension was not built: {error}", file=sys.stderr)

    optimise = ["-O0", "-g"] if enabled("DEBUG") else ["-O3"]
    module = CppExtension(
        "mnv2_kernels._C",
        CPU_SOURCES,
        include_dirs=[str(GENERATED.resolve())],
        depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inc")],
        extra_compile_args=[*optimise, "-fopenmp", "-fvisibility=hidden", "-Wall"],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuildExtension}}


setup(**extension())
