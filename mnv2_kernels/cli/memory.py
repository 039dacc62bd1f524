"""`mnv2 memory`: the bytes a network holds, step by step, and the paper's Table 3."""

import argparse
from collections.abc import Callable

import torch

from ..network.figures import check_ending
from ..network.plan import plan, why_not_on_cpu
from ..ops.extension import missing
from ..profiling import memory_report, table_3
from .console import CannotRun, check_can_write, console, progress, table, write_json
from .named_models import Chosen, chosen


def memory(options: argparse.Namespace) -> int:
    """Bytes a network holds, eager, folded, fused and planned: by arithmetic and measured."""
    if options.table:
        if options.json is not None or options.figure is not None:
            raise CannotRun("--json and --figure must be left out where --table is given")
        _print_table_3()
        return 0
    if missing is not None:
        raise CannotRun(f"needs the compiled kernels: {missing}")
    check_can_write(options.json, "--json")
    check_can_write(options.figure, "--figure")
    if options.figure is not None:
        try:
            check_ending(options.figure, "--figure")
        except ValueError as error:
            raise CannotRun(str(error)) from error
    if options.train and options.figure is not None:
        raise CannotRun("--figure must be left out where --train is given")
    asked = chosen(options)
    if options.train:
        return _of_training(asked, options)
    dtype = getattr(torch, options.dtype)
    # What the kernels do not run has the schedule of the model's own dtype.
    runs = why_not_on_cpu(dtype) is None
    try:
        schedule = plan(asked.model, asked.image, dtype=dtype if runs else None)
    except (TypeError, ValueError) as error:
        return _without_plan(asked, options, str(error).removeprefix("plan: "))
    with progress(f"memory of {asked.name}") as tell:
        report = memory_report.measure(
            asked.name, asked.model, schedule, asked.batch, dtype, tell=tell
        )
    _print_memory(report)
    write_json(options.json, report.document())
    if options.figure is not None:
        report.figure(options.figure)
        print(f"wrote {options.figure}")
    return 0


def _of_training(asked: Chosen, options: argparse.Namespace) -> int:
    """What a training step holds."""
    peaks = _measured(asked, options, memory_report.training_peaks)
    caption = "forward and backward pass, gradients included, image and parameters not"
    _print_peaks(asked, options, peaks, caption)
    write_json(options.json, _document(asked, options, peaks))
    return 0


def _without_plan(asked: Chosen, options: argparse.Namespace, reason: str) -> int:
    """What is measured of a model that has no steps to compute the bytes of."""
    if options.figure is not None:
        raise CannotRun(f"--figure must be left out for {asked.name}: {reason}")
    peaks = _measured(asked, options, memory_report.peaks)
    _print_peaks(asked, options, peaks, "measured, image and result included, weights not")
    print(f"No plan: {reason}.")
    write_json(options.json, _document(asked, options, peaks) | {"why_no_plan": reason})
    return 0


def _measured(asked: Chosen, options: argparse.Namespace, measure: Callable) -> dict[str, int]:
    """Peaks by execution, for random images."""
    x = asked.random_images().to(getattr(torch, options.dtype), memory_format=torch.channels_last)
    with progress(f"memory of {asked.name}") as tell:
        try:
            return measure(asked.model, x, tell=tell)
        except Exception as error:
            raise CannotRun(
                f"--model must take images of {tuple(x.shape[1:])} in {options.dtype},"
                f" {asked.name} says: {error}"
            ) from error


def _print_peaks(
    asked: Chosen, options: argparse.Namespace, peaks: dict[str, int], caption: str
) -> None:
    shape = "x".join(map(str, (asked.batch, *asked.image)))
    made = table(
        *("<execution", "peak bytes", "of eager"),
        title=f"{asked.name}, {shape}, {options.dtype}, threads: {torch.get_num_threads()}",
        caption=caption,
    )
    for name, peak in peaks.items():
        made.add_row(name, f"{peak:,}", f"{peak / peaks['eager']:.1%}")
    console().print(made)


def _document(asked: Chosen, options: argparse.Namespace, peaks: dict[str, int]) -> dict:
    document = {"model": asked.name, "x_shape": [asked.batch, *asked.image]}
    document |= {"dtype": options.dtype, "threads": torch.get_num_threads()}
    executions = {name: {"peak_bytes": peak} for name, peak in peaks.items()}
    return document | {"executions": executions}


def _print_memory(report: memory_report.MemoryReport) -> None:
    shape = "x".join(map(str, report.x_shape))
    steps = table(
        *("<step", *report.executions),
        title=f"{report.model}, {shape}, {report.dtype_name}, threads: {report.threads}",
        caption="KiB held in each step, computed / measured; input and result included, weights"
        " not",
    )
    for i, name in enumerate(report.steps):
        cells = [name or "(the model)"]
        for held in report.executions.values():
            measured = held.measured[i]
            seen = "-" if measured is None else f"{measured / 1024:.0f}"
            cells.append(f"{held.computed[i] / 1024:.0f} / {seen}")
        steps.add_row(*cells)
    peaks = table("<execution", "computed", "measured", "of eager", title="Peak bytes")
    eager = report.executions["eager"].peak_measured
    for name, held in report.executions.items():
        peak = held.peak_measured
        seen, of_eager = ("-", "-") if peak is None else (f"{peak:,}", f"{peak / eager:.1%}")
        peaks.add_row(name, f"{held.peak_computed:,}", seen, of_eager)
    screen = console()
    screen.print(steps)
    screen.print(peaks)
    reasons: dict[str, list[str]] = {}
    for name, held in report.executions.items():
        if held.why_not_measured is not None:
            reasons.setdefault(held.why_not_measured, []).append(name)
    for reason, names in reasons.items():
        print(f"{' and '.join(names)}: not measured: {reason}; line buffers are float32's.")
    print(
        "computed: exact for planned; without the scratch of kernels for the others, and without"
        " what\nmodules inside a block hold for longer than they need it.\n"
        f"planned: arena {report.arena_bytes:,}, line buffers and scratch {report.line_bytes:,}"
        f" on {report.threads} thread{'s' * (report.threads > 1)}.\n"
        f"paper's M(G), blocks split into single hidden channels: {report.paper_bound:,}.\n"
        f"weights, not counted: {report.weight_bytes:,}."
    )


def _print_table_3() -> None:
    screen = console()
    reasons: list[str] = []

    def note(reason: str | None) -> str:
        if reason is None:
            return ""
        if reason not in reasons:
            reasons.append(reason)
        return f" [{reasons.index(reason) + 1}]"

    for version in table_3.VERSIONS:
        made = table(
            *("<size", *table_3.NETWORKS),
            title=f"Table 3 of arXiv 1801.04381, {version} version: channels/kB at 16 bit",
            caption="from the layers | as printed; 1 kB is 1000 bytes",
        )
        cells = table_3.table_3(version)
        for size in (*table_3.SIZES, None):
            row = ["max" if size is None else f"{size}x{size}"]
            for cell in (c for c in cells if c.size == size):
                ours = _channels_and_kb(cell.channels, cell.nbytes and cell.nbytes / 1000)
                printed = _channels_and_kb(cell.printed_channels, cell.printed_kb)
                row.append(f"{ours} | {printed}{note(cell.reason)}")
            made.add_row(*row)
        screen.print(made)
    for number, reason in enumerate(reasons, 1):
        print(f"[{number}] {reason}.")


def _channels_and_kb(channels: int | None, kilobytes: float | None) -> str:
    if kilobytes is None:
        return "1/O(1)"
    return f"{kilobytes:.4g}" if channels is None else f"{channels}/{kilobytes:.4g}"
