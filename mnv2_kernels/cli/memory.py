"""`mnv2 memory`: the bytes a network holds, step by step, and the paper's Table 3."""

import argparse

import torch
from rich.markup import escape
from rich.table import Table

from ..network.plan import plan, why_not_on_cpu
from ..ops.extension import missing
from ..optional import require
from ..profiling import memory_report, table_3
from .console import CannotRun, console
from .named_models import named_model


def memory(options: argparse.Namespace) -> int:
    """Bytes a network holds, eager, folded, fused and planned: by arithmetic and measured."""
    if options.table:
        _print_table_3()
        return 0
    if missing is not None:
        raise CannotRun(f"needs the compiled kernels: {missing}")
    for path in (options.json, options.figure):
        if path is not None and not path.parent.is_dir():
            raise CannotRun(f"the folder of {path} must exist")
    if options.figure is not None:
        require("matplotlib")
    model = named_model(options.model, options.width)
    size, dtype = options.resolution, getattr(torch, options.dtype)
    # What the kernels do not run has the schedule of the model's own dtype.
    runs = why_not_on_cpu(dtype) is None
    try:
        schedule = plan(model, (3, size, size), dtype=dtype if runs else None)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    report = memory_report.measure(options.model, model, schedule, options.batch, dtype)
    _print_memory(report)
    if options.json is not None:
        report.write_json(options.json)
    if options.figure is not None:
        try:
            report.figure(options.figure)
        except ValueError as error:
            raise CannotRun(f"--figure must be a file that can be drawn: {error}") from error
    return 0


def _print_memory(report: memory_report.MemoryReport) -> None:
    shape = "x".join(map(str, report.x_shape))
    steps = Table(
        title=f"{report.model}, {shape}, {report.dtype_name}, threads: {report.threads}",
        caption="KiB held in each step, computed / measured; input and result included, weights"
        " not",
    )
    for heading in ("step", *report.executions):
        steps.add_column(heading, justify="left" if heading == "step" else "right")
    for i, name in enumerate(report.steps):
        cells = [name or "(the model)"]
        for held in report.executions.values():
            measured = held.measured[i]
            seen = "-" if measured is None else f"{measured / 1024:.0f}"
            cells.append(f"{held.computed[i] / 1024:.0f} / {seen}")
        steps.add_row(*cells)
    peaks = Table(title="Peak bytes")
    for heading in ("execution", "computed", "measured", "of eager"):
        peaks.add_column(heading, justify="left" if heading == "execution" else "right")
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
        table = Table(
            title=f"Table 3 of arXiv 1801.04381, {version} version: channels/kB at 16 bit",
            caption="from the layers | as printed; 1 kB is 1000 bytes",
        )
        table.add_column("size")
        for network in table_3.NETWORKS:
            table.add_column(network, justify="right")
        cells = table_3.table_3(version)
        for size in (*table_3.SIZES, None):
            row = ["max" if size is None else f"{size}x{size}"]
            for cell in (c for c in cells if c.size == size):
                ours = _channels_and_kb(cell.channels, cell.nbytes and cell.nbytes / 1000)
                printed = _channels_and_kb(cell.printed_channels, cell.printed_kb)
                row.append(escape(f"{ours} | {printed}{note(cell.reason)}"))
            table.add_row(*row)
        screen.print(table)
    for number, reason in enumerate(reasons, 1):
        print(f"[{number}] {reason}.")


def _channels_and_kb(channels: int | None, kilobytes: float | None) -> str:
    if kilobytes is None:
        return "1/O(1)"
    return f"{kilobytes:.4g}" if channels is None else f"{channels}/{kilobytes:.4g}"
