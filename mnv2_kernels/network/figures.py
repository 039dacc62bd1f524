"""Drawing memory over the steps of a network: one panel a network, one line an execution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from ..ops.optional import require

MIB = 2**20
_COLOURS = {"eager": "C7", "folded": "C1", "fused": "C0", "planned": "C2"}

# Positions, ascending, and the bytes held from each to the next.
Timeline = tuple[Sequence[float], Sequence[int]]


@dataclass(frozen=True)
class Panel:
    """What one network held: a timeline by execution, and levels (bytes) by what they are."""

    title: str
    timelines: Mapping[str, Timeline]
    levels: Mapping[str, int] = field(default_factory=dict)
    position: str = "block"


def check_ending(path: Path | str, argument: str = "path") -> None:
    """ValueError, in the name of an argument, where no figure can be drawn into such a file.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending and ending not in known:
        raise ValueError(f"{argument} must end in one of .{', .'.join(known)}, got {path}")


def draw(panels: Sequence[Panel], path: Path | str) -> None:
    """Save a figure of the panels; the ending of `path` is its format.

    Raises:
        MissingPackage: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or matplotlib does not know its ending.
    """
    check_ending(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        for name, (positions, held) in panel.timelines.items():
            mib = [bytes_ / MIB for bytes_ in held]
            label, colour = f"{name}, peak {max(mib):.2f} MiB", _COLOURS[name]
            axes.fill_between(positions, mib, step="post", color=colour, alpha=0.4)
            axes.step(positions, mib, where="post", color=colour, label=label)
        for (name, bytes_), style in zip(panel.levels.items(), cycle(("--", ":")), strict=False):
            label = f"{name}, {bytes_ / MIB:.2f} MiB"
            axes.axhline(bytes_ / MIB, color="black", linestyle=style, linewidth=1, label=label)
        axes.set(
            title=panel.title,
            xlabel=panel.position,
            ylabel="live activations, MiB",
            ylim=(0, None),
        )
        last = max(positions[-1] for positions, _ in panel.timelines.values())
        axes.set_xticks(range(int(last) + 1))
        axes.legend()
    figure.savefig(path, dpi=120)
