"""Rows of the GPU suite -> the tables of docs/gpu.md."""

from collections.abc import Mapping
from pathlib import Path

from ..harness import RESULTS, Row, geometric_mean, load
from ..markdown import MIB, markdown, percent
from .section import Section

SUITES = ("gpu_network", "gpu_blocks")
KEY = ("suite", "block", "model", "batch", "dtype", "provider")
# The provider of the network that the others are compared with; who is compared by blocks.
OURS = "fused-graph"
OTHERS = ("fused-triton", "unfused", "folded", "eager")


def latest_on_gpu(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The newest row of every workload and provider, by suite, of the GPU that ran last.

    Dry runs and workloads that were skipped are no results.
    """
    rows = [
        row
        for suite in SUITES
        for row in load(suite, folder)
        if not row.get("dry_run") and "skipped" not in row
    ]
    gpu = max(rows, key=lambda row: row["date"])["gpu"] if rows else None
    newest = {tuple(row.get(f) for f in KEY): row for row in rows if row["gpu"] == gpu}
    return {suite: [r for r in newest.values() if r["suite"] == suite] for suite in SUITES}


def gpu_sections(results: Mapping[str, list[Row]]) -> dict[str, Section]:
    """What goes to docs/gpu.md, by marker name; empty where nothing has been measured."""
    network, blocks = results["gpu_network"], results["gpu_blocks"]
    tables = (gpu_block_table(blocks), gpu_run_table(blocks))
    return {
        "gpu-network": Section(
            "The network",
            f"torchvision's MobileNetV2 at 224x224. *{OURS} over it* says how many times as fast"
            f" `{OURS}` is.",
            gpu_network_table(network),
            network,
        ),
        "gpu-blocks": Section(
            "The 17 blocks",
            "Blocks of `fused` in a CUDA graph: float16 at batch 256 block by block, then all by"
            " dtype and batch. *of floor* is the least time that memory and arithmetic allow, over"
            " the time that was measured.",
            "\n\n".join(filter(None, tables)),
            blocks,
        ),
    }


def gpu_network_table(rows: list[Row]) -> str:
    """One line a batch and provider, the fastest first; those that failed last."""
    best = {row["batch"]: row.get("speedup", {}) for row in rows if row["provider"] == OURS}
    body = []
    for r in sorted(rows, key=lambda r: (r["batch"], -r.get("images_per_second", 0))):
        if "error" in r:
            body.append([str(r["batch"]), r["provider"], "-", "failed", "-", "-"])
            continue
        ratio = best.get(r["batch"], {}).get(r["provider"])
        cells = [str(r["batch"]), r["provider"], f"{r['images_per_second']:.0f}"]
        cells += [f"{r['seconds']['50%'] * 1e3:.3f}", percent(r["share_of_floor"])]
        body.append([*cells, ratio_cell(ratio)])
    head = ["batch", "provider", "images a second", "ms a batch", "of its floor"]
    return markdown([*head, f"{OURS} over it"], body)


def gpu_block_table(rows: list[Row]) -> str:
    """One line a distinct block: fp16, batch 256, in a CUDA graph."""
    rows = [r for r in rows if (r["dtype"], r["batch"]) == ("float16", 256) and "error" not in r]
    fused = sorted((r for r in rows if r["provider"] == "fused"), key=lambda r: r["block"])
    folded_peak = {r["block"]: r["peak_bytes"] for r in rows if r["provider"] == "folded"}
    body = []
    for r in fused:
        numbers = r["blocks"]
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        cells = [name, r["config"], f"{r['resolution']}x{r['resolution']}"]
        cells.append(r.get("kernel") or r.get("backend", "-"))
        cells += [f"{r['seconds']['50%'] * 1e6:.1f}", percent(r["share_of_floor"]), r["limit"]]
        cells += [ratio_cell(r["speedup"].get(other)) for other in OTHERS]
        peak = folded_peak.get(r["block"])
        cells.append(f"{r['peak_bytes'] / MIB:.1f}")
        body.append([*cells, "-" if peak is None else f"{peak / MIB:.1f}"])
    head = ["block", "in x hidden x out", "input", "kernel", "us", "of floor", "limit"]
    head += [f"over {other}" for other in OTHERS]
    return markdown([*head, "peak MiB", "folded's"], body)


def gpu_run_table(rows: list[Row]) -> str:
    """One line a dtype and batch: all 17 blocks, a distinct block counted as often as it occurs."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["provider"] == "fused" and "error" not in row:
            groups.setdefault((row["dtype"], row["batch"]), []).extend([row] * len(row["blocks"]))
    body = []
    for (dtype, batch), group in sorted(groups.items(), reverse=True):
        if len(group) != 17:
            continue
        total = sum(row["seconds"]["50%"] for row in group)
        cells = [dtype, str(batch), f"{total * 1e6:.0f}"]
        cells.append(percent(geometric_mean(row["share_of_floor"] for row in group)))
        for other in OTHERS:
            ratios = [row["speedup"].get(other) for row in group]
            cells.append(ratio_cell(None if None in ratios else geometric_mean(ratios)))
        body.append(cells)
    head = ["dtype", "batch", "us, 17 blocks", "of floor"]
    return markdown([*head, *(f"over {other}" for other in OTHERS)], body)


def ratio_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
