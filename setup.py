"""Build the package with its one compiled extension, for the torch that is installed.

Without torch there is nothing to build for, and the build fails; without a compiler the extension
is left out.

Environment: MNV2_KERNELS_SKIP_CPP=1 leaves the extension out, MNV2_KERNELS_FORCE_BUILD=1 makes a
failing compiler an error, DEBUG=1 builds for a debugger. MNV2_KERNELS_CUDA=0 leaves out the CUDA
kernels, which are built where torch has CUDA and nvcc is found, and MNV2_KERNELS_CUDA=1 makes it an
error that they cannot be; TORCH_CUDA_ARCH_LIST names the GPUs that they are for.
MNV2_KERNELS_PIN_TORCH=1 is for wheels that others install: they require the torch release that they
were compiled for. SOURCE_DATE_EPOCH dates the files of a source distribution.
"""

import gzip
import hashlib
import os
import re
import site
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.command.sdist import sdist

OLDEST_TORCH = "2.11"
NO_TORCH = """
mnv2_kernels compiles its kernels for the installed PyTorch, {oldest} or later: {error}. Type

    pip install -U torch setuptools ninja && pip install --no-build-isolation .

or, for a package without kernels: MNV2_KERNELS_SKIP_CPP=1 pip install .
"""

CPU_SOURCES = [
    "csrc/torch/batch_statistics.cpp",
    "csrc/torch/bindings.cpp",
    "csrc/torch/cpu.cpp",
    "csrc/torch/guard.cpp",
    "csrc/torch/host.cpp",
    "csrc/torch/layers.cpp",
    "csrc/torch/ops_backward.cpp",
    "csrc/torch/ops_cpu.cpp",
    "csrc/torch/ops_layers.cpp",
    "csrc/torch/ops_plan.cpp",
    "csrc/torch/ops_training.cpp",
    "csrc/torch/ops_training_backward.cpp",
    "csrc/torch/plain_call.cpp",
    "csrc/torch/program.cpp",
    "csrc/torch/program_checks.cpp",
    "csrc/torch/tensor_facts.cpp",
    "csrc/torch/trained_block.cpp",
    "csrc/cpu/backward.cpp",
    "csrc/cpu/kernels.cpp",
    "csrc/cpu/network.cpp",
    "csrc/cpu/run_block.cpp",
    "csrc/cpu/schedule.cpp",
    "csrc/cpu/isa/avx512.cpp",
    "csrc/cpu/isa/avx2.cpp",
    "csrc/cpu/isa/neon.cpp",
    "csrc/cpu/isa/generic.cpp",
    "csrc/cpu/isa/backward_avx512.cpp",
    "csrc/cpu/isa/backward_avx2.cpp",
    "csrc/cpu/isa/backward_generic.cpp",
    "csrc/cuda/choose.cpp",
]
CUDA_SOURCES = [
    "csrc/torch/ops_cuda.cpp",
    "csrc/cuda/device.cu",
    "csrc/cuda/patch/patch.cu",
    "csrc/cuda/tile/tile.cu",
    "csrc/cuda/generic/generic.cu",
]
# Code for those of these compute capabilities that nvcc knows. Other GPUs of 9.0 and later run what
# the driver compiles at first use from PTX.
CUDA_CAPABILITIES = ("80", "90", "100", "120")
PTX_CAPABILITY = "90"
# Entries of TORCH_CUDA_ARCH_LIST, torch's names among them, that are too old for the kernels.
OLD_ARCHITECTURES = r"[1-7]\.|Kepler|Maxwell|Pascal|Volta|Turing"
# torch takes these conversions and operators of CUDA's types away; the kernels use them.
TAKEN_AWAY = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")

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


def write_header(name: str, macro: str, value: str) -> None:
    """A header and not a flag: a change of it then compiles one file, not all of them."""
    header = GENERATED / name
    text = f'#define {macro} "{value}"\n'
    if not header.exists() or header.read_text() != text:
        GENERATED.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


def write_headers(why_no_cuda: str | None) -> None:
    """What csrc/torch/bindings.cpp says of the build."""
    write_header("source_hash.h", "MNV2_SOURCE_HASH", source_hash())
    if why_no_cuda is None:
        write_header("cuda_build.h", "MNV2_CUDA_VERSION", nvcc_version())
    else:
        write_header("cuda_build.h", "MNV2_WHY_NO_CUDA", why_no_cuda)


def nvcc_version() -> str | None:
    """The CUDA version of the compiler that torch would call, None where there is none."""
    try:
        return re.search(r"release (\d+\.\d+)", nvcc_says("--version"))[1]
    except (OSError, subprocess.CalledProcessError):
        return None


def nvcc_says(option: str) -> str:
    """What the compiler that torch would call prints."""
    from torch.utils.cpp_extension import CUDA_HOME

    command = [str(Path(CUDA_HOME or "", "bin", "nvcc")), option]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not built here, None where they are."""
    import torch

    if os.environ.get("MNV2_KERNELS_CUDA") == "0":
        return "MNV2_KERNELS_CUDA=0 left them out"
    if torch.version.cuda is None:
        return "torch has no CUDA"
    version = nvcc_version()
    if version is None:
        return "nvcc was not found when it was built"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc was of CUDA {version} when it was built, torch of CUDA {torch.version.cuda}"
    return None


def architecture_flags() -> list[str]:
    """For nvcc; none where TORCH_CUDA_ARCH_LIST is set, which torch turns into flags itself."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;"):
        drop_old_architectures()
        return []
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    known = nvcc_says("--list-gpu-code").split()
    codes = [(c, f"sm_{c}") for c in CUDA_CAPABILITIES if f"sm_{c}" in known]
    codes.append((PTX_CAPABILITY, f"compute_{PTX_CAPABILITY}"))
    return [f"-gencode=arch=compute_{c},code={code}" for c, code in codes]


def drop_old_architectures() -> None:
    """Take GPUs that the kernels do not run on out of TORCH_CUDA_ARCH_LIST, and say so."""
    entries = re.split(r"[ ;,]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip(" ;,"))
    old = [entry for entry in entries if re.match(OLD_ARCHITECTURES, entry)]
    left = [entry for entry in entries if entry not in old] or ["8.0"]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(left)
    if not old:
        return
    print(
        f"mnv2_kernels: GPUs must be of compute capability 8.0 or later; {', '.join(old)} of"
        " TORCH_CUDA_ARCH_LIST are left out",
        file=sys.stderr,
    )


def module(cuda: bool):
    """mnv2_kernels._C as setuptools is to build it."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    optimise = ["-O0", "-g"] if enabled("DEBUG") else ["-O3"]
    # Python's own flags may ask for debug information, ten times as large as the code.
    debug = [] if enabled("DEBUG") else ["-g0"]
    cxx = [*optimise, *debug, "-fvisibility=hidden", "-Wall"]
    if sys.platform == "darwin":
        # Apple's clang takes the pragmas of torch's headers so; torch has loaded the library that
        # they call. Nobody has tried this on a Mac yet.
        cxx += ["-Xpreprocessor", "-fopenmp"]
    nvcc = [*optimise, "-Xcompiler=-fvisibility=hidden"]
    nvcc += [f"-U__CUDA_NO_{name}__" for name in TAKEN_AWAY]
    nvcc += architecture_flags() if cuda else []
    headers = (".h", ".inc", ".cuh")
    return (CUDAExtension if cuda else CppExtension)(
        "mnv2_kernels._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[str(GENERATED.resolve())],
        depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in headers],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    )


def without_torch(message: str) -> dict:
    """The setup() arguments with which a source distribution can be made, and a build ends early.

    pip asks for the metadata before it downloads torch and the rest.
    """

    def refuse(command):
        raise SystemExit(message)

    commands = {c.__name__: type(c.__name__, (c,), {"run": refuse}) for c in (build_ext, dist_info)}
    return {"ext_modules": [Extension("mnv2_kernels._C", [])], "cmdclass": commands}


def extension() -> dict:
    """The setup() arguments that build mnv2_kernels._C."""
    if enabled("MNV2_KERNELS_SKIP_CPP"):
        return {}
    see_installed_torch()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        return without_torch(NO_TORCH.format(oldest=OLDEST_TORCH, error=error))
    found = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()
    if tuple(map(int, found)) < tuple(map(int, OLDEST_TORCH.split("."))):
        error = f"got {torch.__version__}"
        return without_torch(NO_TORCH.format(oldest=OLDEST_TORCH, error=error))

    class OptionalBuildExtension(BuildExtension):
        """A missing or failing compiler costs the kernels it would compile, nothing else."""

        def run(self):
            reason = why_no_cuda()
            cuda_asked = enabled("MNV2_KERNELS_CUDA")
            if cuda_asked and reason is not None:
                raise RuntimeError(f"MNV2_KERNELS_CUDA=1 asks for CUDA kernels, but {reason}")
            forced = cuda_asked or enabled("MNV2_KERNELS_FORCE_BUILD")
            if reason is None:
                # A run that fails leaves these changed.
                compiler, inplace = self.compiler, self.inplace
                try:
                    return self.build(None)
                except Exception as error:
                    if forced:
                        raise
                    print(f"mnv2_kernels: no CUDA kernels were built: {error}", file=sys.stderr)
                self.compiler, self.inplace = compiler, inplace
                vars(self.extensions[0]).update(vars(module(cuda=False)))
                reason = "nvcc failed when it was built"
            try:
                self.build(reason)
            except Exception as error:
                if forced:
                    raise
                self.extensions = []
                print(f"mnv2_kernels: the extension was not built: {error}", file=sys.stderr)

        def build(self, why_no_cuda):
            write_headers(why_no_cuda)
            super().run()

    modules = [module(cuda=why_no_cuda() is None)]
    return {"ext_modules": modules, "cmdclass": {"build_ext": OptionalBuildExtension}}


def see_installed_torch() -> None:
    """Let a build by pip import the torch of the environment that pip installs into.

    pip hides the packages of that environment from a build, but runs its interpreter.
    """
    for folder in site.getsitepackages():
        if Path(folder, "torch").is_dir() and folder not in sys.path:
            sys.path.append(folder)


def torch_requirement() -> str:
    if not enabled("MNV2_KERNELS_PIN_TORCH"):
        return f"torch>={OLDEST_TORCH}"
    try:
        import torch
    except ImportError:
        return f"torch>={OLDEST_TORCH}"  # The build ends with the sentence of NO_TORCH.
    return "torch=={}.{}.*".format(*torch.__version__.split("."))


class ReproducibleSdist(sdist):
    """The same bytes of the same files: in order, owned by nobody, dated SOURCE_DATE_EPOCH."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **owner):
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **owner)
        date = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
        archive = f"{base_name}.tar.gz"
        Path(archive).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(archive, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=date) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for path in sorted(p for p in Path(base_dir).rglob("*") if p.is_file()):
                entry = tarfile.TarInfo(path.as_posix())
                entry.size, entry.mtime = path.stat().st_size, date
                entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                with path.open("rb") as content:
                    tar.addfile(entry, content)
        return archive


arguments = extension()
commands = {"sdist": ReproducibleSdist, **arguments.pop("cmdclass", {})}
setup(cmdclass=commands, install_requires=[torch_requirement()], **arguments)
