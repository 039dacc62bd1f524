"""Tables of this package on the CPU, and the choice of rows for all tables of the CPU."""

from collections.abc import Mapping
from pathlib import Path

from ..harness import RESULTS, Row, geometric_mean, load
from ..markdown import MIB, markdown, percent
from .peer_tables import peer_tables

SUITES = ("block", "scaling", "network", "memory", "peers", "peers-memory", "widths")
KEY = ("suite", "instruction_set", "threads", "batch", "block", "model", "provider")
KEY += ("width", "resolution")


def latest(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The newest row of every workload and provider, by suite, of the machine that ran last."""
    rows = [row for suite in SUITES for row in load(suite, folder)]
    if not rows:
        return {suite: [] for suite in SUITES}
    cpu = max(rows, key=lambda row: row["date"])["cpu"]
    newest: dict[tuple, Row] = {}
    for row in rows:
        if row["cpu"] == cpu:
            newest[tuple(row.get(field) for field in KEY)] = row
    found: dict[str, list[Row]] = {suite: [] for suite in SUITES}
    for row in newest.values():
        found[row["suite"]].append(row)
    return found


def tables(results: Mapping[str, list[Row]]) -> dict[str, str]:
    """Markdown by marker name; a name is missing where there are no rows for it."""
    made = {
        "blocks": block_table(results["block"]),
        "block-runs": run_table(results["block"]),
        "network": network_table(results["network"]),
        "memory": memory_table(results["memory"]),
        "widths": width_table(results["widths"]),
        **peer_tables(results),
        "machine": machine_sentence([row for rows in results.values() for row in rows]),
    }
    return {name: text for name, text in made.items() if text}


def best_instruction_set(rows: list[Row]) -> list[Row]:
    """The rows of the instruction set that PyTorch was compared on."""
    compared = {row["instruction_set"] for row in rows if row["provider"] == "folded"}
    return [row for row in rows if row["instruction_set"] in compared]


def block_table(rows: list[Row]) -> str:
    """One line a block: one thread, batch 1."""
    rows = [r for r in best_instruction_set(rows) if r["threads"] == r["batch"] == 1]
    fused = sorted((r for r in rows if r["provider"] == "fused"), key=lambda r: r["block"])
    folded_peak = {r["block"]: r["peak_bytes"] for r in rows if r["provider"] == "folded"}
    body = [
        [
            str(r["block"]),
            r["config"],
            f"{r['resolution']}x{r['resolution']}",
            f"{r['seconds']['50%'] * 1e6:.0f}",
            f"{r['gflops']:.0f}",
            percent(r["share_of_fma_peak"]),
            f"{r['speedup']['folded']:.2f}x",
            f"{r['speedup']['eager']:.2f}x",
            f"{r['peak_bytes'] / MIB:.2f}",
            f"{folded_peak[r['block']] / MIB:.2f}",
        ]
        for r in fused
    ]
    head = ["block", "in x hidden x out", "input", "us", "GFLOP/s", "of FMA peak"]
    head += ["over folded", "over eager", "peak MiB", "folded's"]
    return markdown(head, body)


def run_table(rows: list[Row]) -> str:
    """One line a run of all 17 blocks: instruction set, threads, batch."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["provider"] == "fused":
            key = row["instruction_set"], row["threads"], row["batch"]
            groups.setdefault(key, []).append(row)
    body = []
    for (isa, threads, batch), group in sorted(groups.items()):
        if len(group) != 17:
            continue
        shares = [row["share_of_fma_peak"] for row in group]
        cells = [isa, str(threads), str(batch)]
        cells.append(f"{sum(r['seconds']['50%'] for r in group) * 1e3 / batch:.2f}")
        cells.append(percent(None if None in shares else geometric_mean(shares)))
        for other in ("folded", "eager"):
            ratios = [row["speedup"].get(other) for row in group]
            cells.append("-" if None in ratios else f"{geometric_mean(ratios):.2f}x")
        body.append(cells)
    head = ["instruction set", "threads", "batch", "ms an image, 17 blocks", "of FMA peak"]
    return markdown([*head, "over folded", "over eager"], body)


def network_table(rows: list[Row]) -> str:
    """One line a provider, thread count and batch."""
    body = [
        [
            r["model"],
            r["provider"],
            str(r["threads"]),
            str(r["batch"]),
            f"{r['seconds']['50%'] * 1e3 / r['batch']:.2f}",
            percent(r["share_of_fma_peak"]),
            f"{r['speedup']['folded']:.2f}x" if "folded" in r["speedup"] else "1",
        ]
        for r in sorted(rows, key=lambda r: (r["threads"], r["batch"]))
    ]
    head = ["network", "provider", "threads", "batch", "ms an image", "of FMA peak", "over folded"]
    return markdown(head, body)


def memory_table(rows: list[Row]) -> str:
    """One line a provider and batch, with what every further image costs."""
    first = {row["provider"]: row for row in rows if row["batch"] == 1}
    body = []
    for row in sorted(rows, key=lambda r: r["batch"]):
        further = "-"
        if row["batch"] > 1 and row["provider"] in first:
            grown = row["peak_bytes"] - first[row["provider"]]["peak_bytes"]
            further = f"{grown / (row['batch'] - 1) / MIB:.2f}"
        body.append(
            [
                row["provider"],
                str(row["batch"]),
                f"{row['peak_bytes'] / MIB:.2f}",
                f"{row['peak_bytes_computed'] / MIB:.2f}",
                further,
            ]
        )
    return markdown(
        ["provider", "batch", "peak MiB", "computed", "MiB for every further image"], body
    )


def width_table(rows: list[Row]) -> str:
    """One line a dtype, batch and width; shares of the peak by resolution, and over 1.0 at 224."""
    resolutions = sorted({row["resolution"] for row in rows})
    lines: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        key = row["instruction_set"], row["dtype"], row["threads"], row["batch"], row["width"]
        lines.setdefault(key, {})[row["resolution"]] = row
    body = []
    # float32 first, then by batch and width.
    for key, found in sorted(lines.items(), key=lambda line: (line[0][1] != "float32", line[0])):
        cells = [str(field) for field in key]
        for resolution in resolutions:
            row = found.get(resolution)
            cells.append("-" if row is None else _width_cell(row))
        body.append(cells)
    heads = [f"{resolution}x{resolution}" for resolution in resolutions]
    return markdown(["instruction set", "dtype", "threads", "batch", "width", *heads], body)


def _width_cell(row: Row) -> str:
    over = row["share_over_reference"]
    return percent(row["share_of_fma_peak"]) + ("" if over is None else f" ({percent(over)})")


def machine_sentence(rows: list[Row]) -> str:
    """What the newest row says of the machine and the software."""
    if not rows:
        return ""
    row = max(rows, key=lambda row: row["date"])
    return (
        f"{row['cpu']}, {row['cores']} cores, L1d {row['l1d']}, L2 {row['l2']}, L3 {row['l3']};"
        f" {row['system']}, torch {row['torch']}, Python {row['python']},"
        f" compiler {row['compiler']}; commit {row['commit']}, {row['date'][:10]}."
    )
