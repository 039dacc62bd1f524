"""Rows of one run as aligned lines."""

from collections.abc import Iterable, Iterator

from ..harness import REFERENCE_SIZE, Row, geometric_mean

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
                + ("" if over is None else f"  {over:>5.0%} of {width} at {resolution}")
            )


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
