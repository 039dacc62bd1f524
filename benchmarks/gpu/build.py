"""Part `build` of the GPU suite: the extension with its CUDA kernels, compiled in place."""

import os
import re
import sys
from pathlib import Path
from time import perf_counter

from .checks import TAIL, child
from .part import Context, Failed

JOBS = 16
CHECK = """
from mnv2_kernels.ops.extension import cuda_missing, module
assert cuda_missing is None, cuda_missing
print("CUDA", module.build_info()["cuda"])
"""


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
        # ninja, without which the files are compiled one after another, stands beside Python.
        PATH=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        MAX_JOBS=str(JOBS),
        MNV2_KERNELS_SKIP_CPP="0",
        TORCH_CUDA_ARCH_LIST="",
        MNV2_KERNELS_FORCE_BUILD="1",
        MNV2_KERNELS_CUDA="1",
    )
    seconds = perf_counter() - start
    row = {"suite": "gpu_build", "exit_code": code, "build_seconds": seconds}
    if code != 0:
        context.keep([row | {"output": output[-TAIL:]}])
        ended = "its time was over" if code is None else f"it ended with {code}"
        raise Failed(f"build: {ended}:\n{said_last(output)}")
    code, output = child([sys.executable, "-c", CHECK], context.left())
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
