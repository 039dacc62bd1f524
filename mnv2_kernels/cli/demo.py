"""The demonstration: two trained networks, five photographs, plain against fused.

Same answers, checked against float64; then latency, share of the machine's peak, and memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..network.figures import Panel, draw
from ..optional import require
from ..profiling.memory import live_bytes, peak_bytes
from ..profiling.timing import fma_peak, interleave, median, speedup
from ..profiling.variants import block_calls, fused_blocks, plain, variants
from ..profiling.verify import kernels, why_wrong
from .pretrained import PHOTOGRAPHS, Trained, dog_mobilenet_v2, efficientnet_lite0, photograph

FIGURE = "mnv2_memory.png"
# Two networks, at most so long each, leave time for the rest within two minutes on slow machines.
TIMING_SECONDS = 20.0
MIB = 2**20


def demonstrate(console: Console, folder: Path, *, rounds: int) -> int:
    """Run the demonstration and print it; the figure goes to `folder`. Returns the exit status.

    Raises:
        MissingPackage: an optional package is missing.
        WrongWeights: a weights file is not the expected one.
    """
    require("matplotlib", "skimage", "PIL")
    running, reasons = kernels()
    if not running:
        console.print(f"No kernel runs here, so the blocks run layer by layer. {reasons[0]}")
    agree = True
    panels = []
    with torch.inference_mode():
        for load in (efficientnet_lite0, dog_mobilenet_v2):
            with step(console, "loading a trained network"):
                network = load()
                copies = variants(network.model)
                images = {name: network.preprocess(photograph(name)) for name in PHOTOGRAPHS}
            x = images["coffee"]
            with step(console, f"{network.name}: classifying {len(images)} photographs"):
                table, same = answers(network, copies, images)
            console.print(table)
            agree &= same
            with step(console, f"{network.name}: timing {len(copies)} variants in turns"):
                table = performance(network.name, copies, x, rounds, most_seconds=TIMING_SECONDS)
            console.print(table)
            with step(console, f"{network.name}: following its memory"):
                blocks = list(fused_blocks(copies["fused"]))
                timelines = {
                    name: memory_timeline(copies[name], blocks, x) for name in ("plain", "fused")
                }
                panels.append(Panel(network.name, timelines))
    path = folder / FIGURE
    with step(console, "drawing the figure"):
        draw(panels, path)
    console.print(
        f"Live memory of every block, plain against fused: {path}", markup=False, soft_wrap=True
    )
    console.print("Plain and fused networks agree." if agree else "ANSWERS DIFFER.")
    return 0 if agree else 1


def answers(
    network: Trained, copies: Mapping[str, nn.Module], images: Mapping[str, Tensor]
) -> tuple[Table, bool]:
    """What the plain and the fused network say about each image, and whether they agree.

    They do if each image's first class is the same and the logits of all images together are as
    near to the float64 network's as the numerics policy asks. Its yardstick is "folded": weights
    rounded after folding move the logits, whatever runs them.
    """
    x = torch.cat(list(images.values()))
    truth = plain(network.model).double()(x.double())
    logits = {name: copy(x) for name, copy in copies.items()}
    wrong = why_wrong(logits["fused"], logits["folded"], truth)
    table = Table(
        title=f"{network.name}: most probable class, distance of the logits from float64",
        caption=wrong,
    )
    for heading in ("photograph", "plain", "fused"):
        table.add_column(heading)
    for name in copies:
        table.add_column(name, justify="right")
    all_same = True
    for i, name in enumerate(images):
        first = {kind: _first_class(network, y[i]) for kind, y in logits.items()}
        same = first["plain"][0] == first["fused"][0]
        all_same &= same
        table.add_row(
            name,
            "{} {:.3f}".format(*first["plain"]),
            "{} {:.3f}".format(*first["fused"]) + ("" if same else " (!)"),
            *(f"{(y[i] - truth[i]).abs().max().item():.1e}" for y in logits.values()),
        )
    return table, all_same and wrong is None


def _first_class(network: Trained, logits: Tensor) -> tuple[str, float]:
    probability, index = logits.softmax(0).max(0)
    return network.class_names[index], probability.item()


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Say what is being done: while it lasts on a terminal, as a line elsewhere."""
    if console.is_terminal:
        # Twice a second, so that drawing the spinner does not disturb what is being timed.
        with console.status(what, refresh_per_second=2):
            yield
    else:
        console.print(f"{what} ...")
        yield


def performance(
    title: str,
    copies: Mapping[str, nn.Module],
    x: Tensor,
    rounds: int,
    *,
    most_seconds: float = inf,
) -> Table:
    """Latency, share of the measured FMA peak and peak memory of each variant on x.

    Takes `rounds` samples of each, fewer (but 3) once they have taken `most_seconds`.
    """
    with FlopCounterMode(display=False) as counter:
        copies["plain"](x)
    flops = counter.get_total_flops()
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda copy=copy: copy(x) for name, copy in copies.items()
    }
    peak = fma_peak()
    samples = interleave(calls, rounds=1)
    while len(samples["plain"]) < rounds and (
        len(samples["plain"]) < 3 or sum(map(sum, samples.values())) < most_seconds
    ):
        for name, more in interleave(calls, rounds=1, warmup=0).items():
            samples[name] += more
    taken = len(samples["plain"])
    table = Table(
        title=f"{title}: batch {x.shape[0]}, {x.shape[2]}x{x.shape[3]},"
        f" threads: {torch.get_num_threads()}",
        caption=f"medians of {taken} rounds in turns; memory without weights and input",
    )
    for heading in ("variant", "ms", "vs plain", "vs folded", "GFLOP/s", "of FMA peak", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, call in calls.items():
        seconds = median(samples[name])
        rate = flops / seconds / 1e9
        table.add_row(
            name,
            f"{seconds * 1e3:.2f}",
            *(f"{speedup(samples[name], samples[base]):.2f}x" for base in ("plain", "folded")),
            f"{rate:.0f}",
            "-" if peak is None else f"{rate / peak:.0%}",
            f"{peak_bytes(call) / MIB:.2f}",
        )
    return table


def memory_timeline(
    model: nn.Module, blocks: Sequence[str], x: Tensor
) -> tuple[list[float], list[int]]:
    """(position, bytes) of the activations alive while each block runs, its input included.

    Block i covers the positions from i to i + 1, one point an allocation or release.
    """
    positions, live = [], []
    for i, (call, block_x) in enumerate(block_calls(model, blocks, x).values()):
        call()
        held = [0, *live_bytes(call)]
        positions += [i + j / len(held) for j in range(len(held))]
        live += [block_x.nbytes + bytes_ for bytes_ in held]
    return positions, live
