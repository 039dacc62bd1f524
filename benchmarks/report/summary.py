"""Rows of one run as aligned lines, and the few figures that the project is judged by."""

from collections.abc import Iterable, Iterator

from ..harness import REFERENCE_SIZE, Row, geometric_mean
from ..machine import facts

MIB = 2**20


def by_run(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows of suite `block` by (instruction set, threads, batch), in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["suite"] == "block":
            key = row["instruction_set"], row["threads"], row["batch"]
            groups.setdefault(key, []).append(row)
    return groups


def with_common_bound(rows: list[Row]) -> list[Row]:
    """The rows, with the most that was measured in the run as the bound of all of them.

    Noise only ever lowers a measured peak; the bound of one instruction set and thread count is
    one number, and no share of it flatters because the peak was measured in a bad moment.
    """
    bounds: dict[tuple, float] = {}
    for row in rows:
        if row.get("fma_peak_gflops"):
            key = row["instruction_set"], row["threads"]
            bounds[key] = max(row["fma_peak_gflops"], bounds.get(key, 0.0))
    changed = []
    for row in rows:
        if row.get("fma_peak_gflops"):
            bound = bounds[row["instruction_set"], row["threads"]]
            row = {**row, "fma_peak_gflops": bound, "share_of_fma_peak": row["gflops"] / bound}
        changed.append(row)
    return changed


def lines(rows: list[Row]) -> Iterator[str]:
    """One line a workload; the geometric mean closes every group of blocks."""
    for (isa, threads, batch), group in by_run(rows).items():
        yield f"blocks, {isa}, threads {threads}, batch {batch}"
        fused = [row for row in group if row["provider"] == "fused"]
        for row in fused:
            yield f"  {row['block']:>2}  {row['config']:<20}" + figures(row)
        yield "  geometric mean" + " " * 10 + mean_figures(fused)
    for row in rows:
        if row["suite"] == "scaling" and row["threads"] == 2:
            yield f"block {row['block']:>2}, 2 threads over 1: {row['speedup']['1 thread']:.2f}x"
        elif row["suite"] == "network":
            label = f"{row['model']}, threads {row['threads']}, batch {row['batch']}"
            yield f"{label}, {row['provider']:<8}" + figures(row)
        elif row["suite"] == "memory":
            yield (
                f"{row['model']}, batch {row['batch']}, {row['provider']:<8}"
                f"{row['peak_bytes'] / MIB:9.2f} MiB at the peak,"
                f" {row['peak_bytes_computed'] / MIB:.2f} computed"
            )
        elif row["suite"] == "peers-memory":
            yield (
                f"{row['model']}, batch {row['batch']}, {row['provider']:<13}"
                f"{row['load_bytes'] / MIB:9.2f} MiB loaded,"
                f" {row['run_bytes'] / MIB:.2f} more at the peak of the first runs"
            )
        elif row["suite"] == "widths":
            over = row["share_over_reference"]
            width, resolution = REFERENCE_SIZE
            yield (
                f"{row['width']:<4} at {row['resolution']:<3}, {row['provider']},"
                f" batch {row['batch']}"
                + figures({**row, "speedup": {}})
                + ("" if over is None else f"  {over:>5.0%} of that of {width} at {resolution}")
            )
        elif row["suite"] == "acceptance":
            yield f"{row['name']}: {row['value']:.3g} {row['unit']}"


def figures(row: Row) -> str:
    """Time, rate, share of the bound, and how much faster than the others."""
    share = row["share_of_fma_peak"]
    text = f"{row['seconds']['50%'] * 1e6:>10.1f} us {row['gflops']:>7.1f} GFLOP/s"
    text += "" if share is None else f" {share:>5.0%} of peak"
    return text + "".join(f"  {ratio:>5.2f}x {name}" for name, ratio in row["speedup"].items())


def mean_figures(rows: list[Row]) -> str:
    """The same of several rows: total time, and geometric means of the ratios."""
    total = sum(row["seconds"]["50%"] for row in rows)
    rate = geometric_mean(row["gflops"] for row in rows)
    text = f"{total * 1e6:>10.1f} us {rate:>7.1f} GFLOP/s"
    if all(row["share_of_fma_peak"] for row in rows):
        text += f" {geometric_mean(row['share_of_fma_peak'] for row in rows):>5.0%} of peak"
    for name in rows[0]["speedup"]:
        text += f"  {geometric_mean(row['speedup'][name] for row in rows):>5.2f}x {name}"
    return text


def acceptance(rows: list[Row]) -> list[Row]:
    """The figures the project is judged by, as far as these rows hold all that they need.

    Over the 17 blocks (one thread, batch 1, 224x224, best instruction set): geometric means,
    worst block, block 1; two threads over one; the whole network over folded eager PyTorch.
    """
    found: list[Row] = []

    def add(name: str, value: float, unit: str, **details: object) -> None:
        row = {"suite": "acceptance", "name": name, "value": value, "unit": unit}
        found.append({**row, **details, **facts()})

    isa = facts()["instruction_set"]
    blocks = [
        row
        for row in by_run(rows).get((isa, 1, 1), [])
        if row["provider"] == "fused" and "folded" in row["speedup"]
    ]
    if len(blocks) == 17:
        for name, of in (
            ("share of FMA peak", lambda row: row["share_of_fma_peak"]),
            ("speed-up over folded eager", lambda row: row["speedup"]["folded"]),
        ):
            unit = "of peak" if name.startswith("share") else "x"
            values = [of(row) for row in blocks]
            if None in values:
                continue
            worst = min(range(17), key=values.__getitem__)
            add(f"17 blocks, geometric mean: {name}", geometric_mean(values), unit)
            add(f"worst block: {name}", values[worst], unit, block=worst + 1)
            add(f"block 1: {name}", values[0], unit)
    scaling = [r for r in rows if r["suite"] == "scaling" and r["threads"] == 2]
    if len(scaling) == 17:
        ratios = [row["speedup"]["1 thread"] for row in scaling]
        add("17 blocks, geometric mean: 2 threads over 1", geometric_mean(ratios), "x")
        add("worst block: 2 threads over 1", min(ratios), "x")
    for row in rows:
        if row["suite"] == "network" and row["provider"] == "fused":
            where = f"threads {row['threads']}, batch {row['batch']}"
            ratio = row["speedup"]["folded"]
            add(f"{row['model']}, {where}: speed-up over folded eager", ratio, "x")
        if row["suite"] == "network" and row["provider"] == "planned":
            where = f"threads {row['threads']}, batch {row['batch']}"
            add(f"{row['model']}, {where}: plan over fused", row["speedup"]["fused"], "x")
    widths: dict[tuple, list[float | None]] = {}
    for row in rows:
        if row["suite"] == "widths":
            key = row["dtype"], row["batch"], row["threads"]
            widths.setdefault(key, []).append(row["share_over_reference"])
    for (dtype, batch, threads), shares in widths.items():
        if None not in shares:
            where = f"{dtype}, threads {threads}, batch {batch}"
            name = f"widths and resolutions, {where}: least share over that of 1.0 at 224"
            add(name, min(shares), "of peak")
    return found
