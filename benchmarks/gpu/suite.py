"""All measurements and checks on a GPU, in one command that ends in time.

    python -m benchmarks.gpu.suite --out FOLDER [--parts device,blocks] [--minutes 9]
    python -m benchmarks.gpu.suite --out FOLDER --dry-run      # on a CPU, as far as that goes

Every part runs in a process of its own, which is ended when its time is over, and appends its rows
to FOLDER/gpu_<part>.jsonl as soon as it has them. Called again, `blocks` and `network` measure only
what is missing there; the other parts start anew. The exit code is 0 if every part ended well.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mnv2_kernels.ops.triton import configs

from . import machine
from .blocks import run_blocks, run_network
from .checks import run_build, run_sanitizer, run_tests
from .machine import measure_device
from .part import Context, Failed, child

# Time for the processes to end.
MARGIN_SECONDS = 8
LEAST_SECONDS = 15


def run_device(context: Context) -> None:
    """Suite `gpu_device`: facts and measured rates."""
    row = measure_device(dry_run=context.dry_run)
    context.keep([row])
    terabytes = row["bytes_per_second"] / 1e12
    products = row["product_flops_per_second"]["float16"] / 1e12
    print(f"device: {row['gpu']}, {terabytes:.3g} TB/s copied, {products:.3g} TFLOP/s in fp16")


def run_tune(context: Context) -> None:
    """Write a table of configurations for this GPU to the folder, and put it to use."""
    if context.dry_run:
        context.skip("gpu_tune", "no GPU")
        return
    from .tune_triton import tune

    # It ends with the block that it is at when its minutes are over, and writes its table then.
    table = tune(minutes=0.75 * context.left() / 60, out=context.out)
    # The following parts are measured with it.
    shutil.copy(table, configs.TABLES)


class Part(NamedTuple):
    """What runs, and its share of the time left for it and the following parts."""

    run: Callable[[Context], None]
    share: float


PARTS = {
    "build": Part(run_build, 6),
    "device": Part(run_device, 1),
    "tests": Part(run_tests, 3),
    "sanitizer-cuda": Part(partial(run_sanitizer, backend="cuda"), 3),
    "sanitizer-triton": Part(partial(run_sanitizer, backend="triton"), 2),
    "tune": Part(run_tune, 3),
    "blocks": Part(run_blocks, 4),
    "network": Part(run_network, 5),
}


def run_part(name: str, context: Context) -> int:
    """Run a part here; 1 where it failed, with the reason printed."""
    try:
        PARTS[name].run(context)
    except Failed as reason:
        print(f"{name}: FAILED: {reason}", flush=True)
        return 1
    return 0


def run_suite(names: list[str], options: argparse.Namespace, deadline: float) -> dict[str, str]:
    """Run parts one after another, each in a process; what became of each by name."""
    became = {}
    for i, name in enumerate(names):
        left = deadline - time.monotonic() - MARGIN_SECONDS
        seconds = left * PARTS[name].share / sum(PARTS[other].share for other in names[i:])
        if seconds < LEAST_SECONDS:
            became[name] = "skipped: no time left"
            continue
        print(f"== {name}, at most {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.suite", "--in-process", "--parts", name]
        command += ["--out", str(options.out), "--minutes", str(seconds / 60)]
        command += ["--dry-run"] if options.dry_run else []
        command += ["--commit", options.commit] if options.commit else []
        code, _ = child(command, seconds + MARGIN_SECONDS / 2, stream=True)
        became[name] = {0: "ok", None: "ended: its time was over"}.get(code, f"FAILED ({code})")
    return became


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=lambda p: Path(p).resolve(), required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, in this order")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--commit", help="what the sources are, where git cannot tell")
    parser.add_argument("--in-process", action="store_true", help="one part, in this process")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return options


def main() -> int:
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        print("suite: there is no GPU; --dry-run goes as far as a CPU does")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    if options.dry_run:
        torch.set_num_threads(1)
    if options.in_process:
        if options.commit:
            machine.COMMIT.append(options.commit)
        context = Context(options.out, deadline, options.dry_run)
        return max(run_part(name, context) for name in options.parts)
    became = run_suite(options.parts, options, deadline)
    for name, text in became.items():
        print(f"{name:<10} {text}")
    return int(set(became.values()) != {"ok"})


if __name__ == "__main__":
    sys.exit(main())
