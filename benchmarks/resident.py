"""Peak resident bytes of a fresh process over the loaded model.

`python -m benchmarks.resident` prints them.

A cross-check of the allocator's events, which see tensors only: pages of the system count here,
with all that libraries allocate by themselves. Prints one number; Linux with glibc only.
"""

import argparse
import ctypes
import gc
import re
from pathlib import Path

import torch

from mnv2_kernels import mobilenet_v2, plan
from mnv2_kernels.profiling import memory_report


def resident_growth(execution: str, resolution: int, batch: int) -> int:
    """Bytes by which one call's peak is above what is resident before, input included.

    The model has run before, so that its code is made and loaded and its weights are packed.
    """
    model = mobilenet_v2().eval()
    if execution == "planned":
        call = plan(model, (3, resolution, resolution))
    else:
        call = memory_report.executions(model)[execution]
    with torch.inference_mode():
        call(_image(resolution, batch))
        # What has been freed would be used unseen by the call.
        before = settled()
        call(_image(resolution, batch))
        return peak() - before


def settled() -> int:
    """Resident bytes of this process, after giving back what has been freed.

    Forgets the highest mark of the process: `peak` begins anew.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that have been resident since `settled`."""
    return _status("VmHWM")


def _image(size: int, batch: int) -> torch.Tensor:
    return torch.ones(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def _status(name: str) -> int:
    kibibytes = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(kibibytes[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("execution", choices=memory_report.EXECUTIONS)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(resident_growth(options.execution, options.resolution, options.batch))


if __name__ == "__main__":
    main()
