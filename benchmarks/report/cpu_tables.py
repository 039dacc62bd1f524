"""Tables of this package on the CPU, and the choice of rows for all tables of the CPU."""

from collections.abc import Mapping
from pathlib import Path

from ..harness import REFERENCE_SIZE, RESULTS, Row, geometric_mean, load
from ..markdown import MIB, markdown, percent
from .peer_tables import OF_FLOAT32_PEAK, is_of_network, is_of_relative, peer_sections
from .section import Section

SUITES = ("block", "network", "memory", "peers", "peers-memory", "widths", "training", "models")
KEY = ("suite", "instruction_set", "threads", "batch", "block", "model", "provider")
KEY += ("width", "resolution", "norms")


def latest(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The newest row of every workload and provider, by suite, of the machine that ran last.

    Rows of another network beside other runtimes have a last machine of their own, and so have
    those of training.
    """
    rows = [row for suite in SUITES for row in load(suite, folder)]
    if not rows:
        return {suite: [] for suite in SUITES}
    of_models: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        of_models[_measured(row)] = row
    newest: dict[tuple, Row] = {}
    for row in rows:
        if row["cpu"] == of_models[_measured(row)]["cpu"]:
            newest[tuple(row.get(field) for field in KEY)] = row
    found: dict[str, list[Row]] = {suite: [] for suite in SUITES}
    for row in newest.values():
        found[row["suite"]].append(row)
    return found


def _measured(row: Row) -> tuple:
    """What a machine is chosen for: another network beside other runtimes, training, the rest."""
    if row["suite"] == "training":
        return ("training",)
    return (row["model"],) if row["suite"] == "peers" and is_of_relative(row) else ()


def sections(results: Mapping[str, list[Row]]) -> dict[str, Section]:
    """What goes to docs/performance.md, by marker name; empty where there are no rows for it."""
    blocks = [row for row in best_instruction_set(results["block"]) if is_single(row)]
    by_peers = {(r["threads"], r["batch"]) for r in results["peers"] if is_of_network(r)}
    other_runs = [r for r in results["network"] if (r["threads"], r["batch"]) not in by_peers]
    width, resolution = REFERENCE_SIZE
    return peer_sections(results) | {
        "memory": Section(
            "Memory of the network",
            "The most bytes of activations that are alive at once, input and result included,"
            " weights not; *computed* is the same by arithmetic. `fused` is measured block by"
            " block, because the profiler that counts the bytes disables the run as one call.",
            memory_table(results["memory"]),
            results["memory"],
        ),
        "blocks": Section(
            "The 17 blocks",
            "`fused`, one image, one thread, each block called as a module. *over folded* and"
            " *over eager* say how many times as fast `fused` is; *peak MiB* is the most memory of"
            " activations, of `fused` and of `folded`.",
            block_table(blocks),
            blocks,
            {
                "share_of_peak.svg": "Share of the multiply-add peak, block by block",
                "peak_memory.svg": "Peak memory of activations, block by block",
            },
        ),
        "block-runs": Section(
            "The 17 blocks by instruction set, threads and batch",
            "All blocks of `fused`: the sum of their times, and geometric means of the other"
            " columns. Each block is called by itself, which takes longer than in a network that"
            " runs as one call. PyTorch is compared on the best instruction set only, because it"
            " chooses its own.",
            run_table(results["block"]),
            [row for row in results["block"] if row["provider"] == "fused"],
        ),
        "network": Section(
            "The network at other batch sizes",
            "torchvision's MobileNetV2 at 224x224, float32.",
            network_table(other_runs),
            other_runs,
        ),
        "widths": Section(
            "Other widths and resolutions",
            f"Plans of this package's MobileNetV2: share of the float32 multiply-add peak; in"
            f" brackets: relative to width {width} at {resolution}x{resolution}, same run."
            f" {OF_FLOAT32_PEAK}",
            width_table(results["widths"]),
            results["widths"],
        ),
        "which-models": Section(
            "Which models gain",
            "One image on one thread, float32: how many times as fast, and the peak of activations"
            " relative to `eager`. All run in one process, in turns; in processes of their own"
            " PyTorch's layers take longer (the table before). Where few blocks are fused,"
            " `folded` can be ahead of `fused`, because `fuse` leaves other layers as they are."
            " `mnv2 bench --model` measures yours.",
            model_table(results["models"]),
            results["models"],
        ),
        "training": Section(
            "Training",
            "One step (forward, loss, backward) of torchvision's MobileNetV2 at 224x224, float32."
            " *norms*: batch norms use the statistics of the batch, or are frozen"
            " (`mk.freeze_bn`). `eager` is channels_last; `checkpointed` is that with"
            " `torch.utils.checkpoint` around every block, `compiled` that with `torch.compile`."
            " *peak MiB* is the most that the step holds besides the parameters, gradients"
            " included.",
            training_table(results["training"]),
            results["training"],
        ),
    }


def model_table(rows: list[Row]) -> str:
    """One line a model, the fastest first: blocks fused, speed, and memory beside eager's."""
    models: dict[str, dict[str, Row]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["provider"]] = row
    complete = [found for found in models.values() if {"eager", "folded", "fused"} <= set(found)]
    body = []
    for found in sorted(complete, key=lambda found: -found["fused"]["speedup"]["folded"]):
        fused, eager, planned = (found.get(name) for name in ("fused", "eager", "planned"))
        cells = [fused["model"], f"{fused['blocks_fused']} of {fused['blocks']}"]
        cells += [f"{fused['speedup'][other]:.2f}x" for other in ("eager", "folded")]
        cells.append("-" if planned is None else f"{planned['speedup']['folded']:.2f}x")
        cells += [
            "-" if row is None else percent(row["peak_bytes"] / eager["peak_bytes"])
            for row in (fused, planned)
        ]
        body.append(cells)
    head = ["model", "blocks fused", "fused over eager", "over folded", "plan over folded"]
    return markdown([*head, "memory of fused, of eager's", "of plan"], body)


def is_single(row: Row) -> bool:
    """Whether the row is of one image on one thread."""
    return row["threads"] == row["batch"] == 1


def best_instruction_set(rows: list[Row]) -> list[Row]:
    """The rows of the instruction set that PyTorch was compared on."""
    compared = {row["instruction_set"] for row in rows if row["provider"] == "folded"}
    return [row for row in rows if row["instruction_set"] in compared]


def block_table(rows: list[Row]) -> str:
    """One line a block."""
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


def training_table(rows: list[Row]) -> str:
    """One line a provider, thread count, batch and kind of norms."""
    body = []
    for row in sorted(rows, key=lambda r: (r.get("norms", "frozen"), r["threads"], r["batch"])):
        eager_share = row["share_of_peak_bytes"].get("eager", 1)
        cells = [
            row.get("norms", "frozen"),
            row["provider"],
            str(row["threads"]),
            str(row["batch"]),
        ]
        cells += [f"{row['seconds']['50%'] * 1e3:.1f}", f"{row['speedup'].get('eager', 1):.2f}x"]
        body.append([*cells, f"{row['peak_bytes'] / MIB:.1f}", percent(eager_share)])
    head = ["norms", "provider", "threads", "batch", "ms a step", "over eager", "peak MiB"]
    return markdown([*head, "of eager's"], body)
