"""`mnv2 bench`: which executions of a model gain how much, or other runtimes."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..fuse.explain import explain
from ..network.plan import plan
from ..profiling.comparison import Comparison, compare
from ..profiling.timing import median, num_threads
from ..profiling.variants import plain, variants
from ..profiling.verify import why_wrong
from .console import CannotRun, check_can_write, console, progress, table, write_json
from .named_models import Chosen, chosen

if TYPE_CHECKING:
    from rich.table import Table

MIB = 2**20


def bench(options: argparse.Namespace) -> int:
    """A model eager, folded, fused and planned, timed in turns; or with other runtimes."""
    if options.peers is not None:
        if options.json is not None:
            raise CannotRun("--json must be left out where --peers is given")
        return _bench_peers(options.peers)
    check_can_write(options.json, "--json")
    if options.threads > most_threads():
        raise CannotRun(f"--threads must be at most {most_threads()}, got {options.threads}")
    asked = chosen(options)
    with (
        torch.inference_mode(),
        num_threads(options.threads),
        progress(f"bench {asked.name}") as tell,
    ):
        x = asked.random_images()
        expected = truth(asked, x)
        executions, why_no_plan = executions_of(asked.model, asked.image)
        for name in ("fused", "planned"):
            if name in executions:
                tell(f"checking {name}")
                wrong = why_wrong(executions[name](x), executions["folded"](x), expected)
                if wrong:
                    said = f"mnv2 bench: {name} is wrong, not timed: {wrong}"
                    print(said, file=sys.stderr)
                    return 1
        found = compare(executions, x, rounds=options.rounds, tell=tell)
    report = explain(executions["fused"])
    fused = sum(row.state == "fused" for row in report)
    console().print(performance_table(asked.name, found, x))
    print(f"{fused} of {len(report)} blocks are fused.")
    if why_no_plan is not None:
        print(f"No plan: {why_no_plan}.")
    print(found.verdict)
    write_json(
        options.json,
        {
            "model": asked.name,
            "x_shape": list(x.shape),
            "blocks": len(report),
            "blocks_fused": fused,
            "why_no_plan": why_no_plan,
            **found.document(),
        },
    )
    return 0


def most_threads() -> int:
    """As many as there are cores for this process, or as PyTorch takes by itself."""
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    return max(cores, torch.get_num_threads())


def truth(asked: Chosen, x: Tensor) -> Tensor:
    """What the layers of the model give for x in float64.

    Raises:
        CannotRun: they do not take x, or give something else than a tensor.
    """
    try:
        asked.model(x)
        y = plain(asked.model).double()(x.double())
    except Exception as error:
        raise CannotRun(
            f"--model must take images of --input-shape {asked.image}, {asked.name} says: {error}"
        ) from error
    if not isinstance(y, Tensor):
        kind = type(y).__name__
        raise CannotRun(f"--model must return a tensor, {asked.name} returns a {kind}")
    return y


def executions_of(
    model: nn.Module, image: tuple[int, int, int]
) -> tuple[dict[str, Callable[[Tensor], Tensor]], str | None]:
    """(the executions of a model by name, why "planned" is not among them)."""
    executions: dict[str, Callable[[Tensor], Tensor]] = dict(variants(model))
    try:
        executions["planned"] = plan(model, image)
    except (TypeError, ValueError) as error:
        return executions, str(error).removeprefix("plan: ")
    return executions, None


def performance_table(title: str, found: Comparison, x: Tensor) -> "Table":
    """Latency, share of the measured FMA peak and peak memory of each execution of x."""
    shape = "x".join(map(str, x.shape))
    made = table(
        *("<execution", "ms", "over eager", "over folded", "GFLOP/s", "of FMA peak", "peak MiB"),
        title=f"{title}: {shape}, threads: {found.threads}",
        caption=f"medians of {len(found.samples['eager'])} rounds in turns; memory with image and"
        " result, without\nweights, of fused block by block, as a profiler sees it",
    )
    for name, samples in found.samples.items():
        rate, peak = found.rate(name), found.fma_peak
        made.add_row(
            name,
            f"{median(samples) * 1e3:.2f}",
            *(f"{found.over(name, base):.2f}x" for base in ("eager", "folded")),
            f"{rate:.0f}",
            "-" if peak is None else f"{rate / peak:.0%}",
            f"{found.peaks[name] / MIB:.2f}",
        )
    return made


def _bench_peers(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "peers").is_dir():
        raise CannotRun(f"--peers needs a checkout of the project, {root} has no benchmarks")
    search_path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": search_path}).returncode
