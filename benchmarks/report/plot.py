"""Figures of the results, as SVG in the folder of the rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from mnv2_kernels import mobilenet_v2, plan
from mnv2_kernels.network.memory import live_bytes

from ..harness import Row
from .peer_tables import memory_bars

COLOURS = {"fused": "#3d8fd1", "folded": "#e2a13a", "eager": "#9a9a9a", "planned": "#3f9d63"}
GPU_COLOURS = {"over unfused": "#5b9a68", "over folded": "#e2a13a", "over eager": "#9a9a9a"}
CPU_BLOCKS = "block of MobileNetV2 1.0 at 224x224, batch 1, one thread"
GPU_BLOCKS = "block of MobileNetV2 1.0 at 224x224, batch 256, fp16"
MIB = 2**20
LIVE_MEMORY = "live_memory.svg"
# A grey that can be read on white and on black pages, with nothing drawn under it.
_GREY = "#757d86"
STYLE = {
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "font.size": 11,
    "savefig.transparent": True,
    "svg.hashsalt": "mnv2_kernels",
    "text.color": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


def figures(results: Mapping[str, list[Row]], folder: Path) -> Iterator[Path]:
    """Draw what there are rows for; yields the paths written."""
    rows = [r for r in results["block"] if r["threads"] == r["batch"] == 1]
    compared = {r["instruction_set"] for r in rows if r["provider"] == "folded"}
    by_provider = {
        name: sorted(
            (r for r in rows if r["provider"] == name and r["instruction_set"] in compared),
            key=lambda r: r["block"],
        )
        for name in ("fused", "folded", "eager")
    }
    if not all(by_provider.values()):
        return
    if all(row["share_of_fma_peak"] for row in by_provider["fused"]):
        shares = {
            name: [100 * row["share_of_fma_peak"] for row in rows]
            for name, rows in by_provider.items()
        }
        yield bars(shares, folder / "share_of_peak.svg", "% of the measured FMA peak", (0, 100))
    peaks = {name: [r["peak_bytes"] / MIB for r in rows] for name, rows in by_provider.items()}
    yield bars(peaks, folder / "peak_memory.svg", "peak MiB, input included", None)


def live_memory(rows: list[Row], folder: Path) -> Iterator[Path]:
    """Draw the live bytes over the steps of the network, by arithmetic; peaks are the rows'.

    A plan holds the same from its first step to its last.
    """
    peaks = {row["provider"]: row["peak_bytes"] / MIB for row in rows if row["batch"] == 1}
    names = {"folded": "PyTorch", "fused": "mk.fuse", "planned": "mk.plan"}
    if not peaks.keys() >= names.keys():
        return
    schedule = plan(mobilenet_v2().eval(), (3, 224, 224))
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    last = len(schedule.steps)
    for name, display in names.items():
        held = [peaks["planned"]] * last
        if name != "planned":
            bytes_ = live_bytes(schedule.steps, schedule.input_shape, execution=name)
            held = [b / MIB for b in bytes_]
            axes.stairs(held, fill=True, color=COLOURS[name], alpha=0.35)
        label = f"{display}: peak {peaks[name]:.2f} MiB"
        axes.stairs(held, color=COLOURS[name], linewidth=2, label=label)
    ticks = {0: "stem", 4: "block 4", 9: "block 9", 14: "block 14", last - 1: "classifier"}
    axes.set_xlim(0, last)
    axes.set_xticks([step + 0.5 for step in ticks], ticks.values())
    axes.set_xlabel("MobileNetV2 at 224x224, step by step")
    axes.set_ylabel("live activations, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    yield save(figure, folder / LIVE_MEMORY)


def peer_figures(results: Mapping[str, list[Row]], folder: Path) -> Iterator[Path]:
    """Draw what other runtimes take of memory, where that has been measured."""
    found = dict(memory_bars(results["peers-memory"]))
    if not found:
        return
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(found)), layout="constrained")
    axes = figure.subplots()
    for i, (batch, colour) in enumerate(((1, COLOURS["fused"]), (8, COLOURS["folded"]))):
        places = [place + 0.4 * i for place in range(len(found))]
        sizes = [by_batch[batch] for by_batch in found.values()]
        axes.barh(places, sizes, 0.4, label=f"batch {batch}", color=colour)
    axes.set_yticks([place + 0.2 for place in range(len(found))], list(found))
    axes.invert_yaxis()
    axes.set_xlabel("MiB that a process grows by: weights, input, activations")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    yield save(figure, folder / "peers_memory.svg")


def gpu_figures(results: Mapping[str, list[Row]], folder: Path) -> Iterator[Path]:
    """Draw how much faster fused blocks are on a GPU, where all 17 have been measured there."""
    found = {
        number: row["speedup"]
        for row in results["gpu_blocks"]
        if (row["provider"], row["dtype"], row["batch"]) == ("fused", "float16", 256)
        and "error" not in row
        for number in row["blocks"]
    }
    others = {name: name.removeprefix("over ") for name in GPU_COLOURS}
    if len(found) < 17 or not all(o in s for s in found.values() for o in others.values()):
        return
    ratios = {
        name: [found[number][other] for number in sorted(found)] for name, other in others.items()
    }
    label = "times as fast"
    yield bars(ratios, folder / "gpu_speedup.svg", label, None, GPU_COLOURS, GPU_BLOCKS)


def bars(
    values: Mapping[str, list[float]],
    path: Path,
    label: str,
    limits: tuple[float, float] | None,
    colours: Mapping[str, str] = COLOURS,
    blocks: str = CPU_BLOCKS,
) -> Path:
    """Grouped bars over the block numbers, one colour a provider."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        places = [block + 1 + (i - (len(values) - 1) / 2) * width for block in range(len(heights))]
        axes.bar(places, heights, width, label=name, color=colours[name])
    axes.set_xticks(range(1, 1 + len(heights)))
    axes.set_xlabel(blocks)
    axes.set_ylabel(label)
    if limits:
        axes.set_ylim(*limits)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(values))
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure; the same rows give the same file, so no date and fixed ids."""
    figure.savefig(path, metadata={"Date": None})
    return path
