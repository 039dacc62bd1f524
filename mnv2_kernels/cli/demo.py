"""The demonstration: two trained networks, five photographs, layer by layer against fused.

Same answers, checked against float64; then latency, share of the machine's peak, and memory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..network.figures import Panel, Timeline, draw
from ..network.plan import Plan, plan
from ..ops.optional import require
from ..profiling.comparison import compare
from ..profiling.memory import peak_bytes
from ..profiling.memory_report import timeline, timeline_of
from ..profiling.variants import plain, variants
from ..profiling.verify import why_wrong
from .bench import performance_table
from .console import progress, table
from .pretrained import PHOTOGRAPHS, Trained, dog_mobilenet_v2, efficientnet_lite0, photograph

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FIGURE = "mnv2_memory.png"
# Two networks, at most so long each, leave time for the rest within two minutes on slow machines.
TIMING_SECONDS = 20.0

Executions = Mapping[str, Callable[[Tensor], Tensor]]


def demonstrate(console: "Console", folder: Path, *, rounds: int) -> int:
    """Run the demonstration and print it; the figure goes to `folder`. Returns the exit status.

    Raises:
        MissingPackage: an optional package is missing.
        WrongWeights: a weights file is not the expected one.
    """
    require("matplotlib", "skimage", "PIL")
    agree = True
    panels, verdicts = [], []
    with torch.inference_mode():
        for load in (efficientnet_lite0, dog_mobilenet_v2):
            with progress("loading a trained network") as tell:
                network = load()
                tell(f"{network.name}: fusing and planning")
                images = {name: network.preprocess(photograph(name)) for name in PHOTOGRAPHS}
                x = images["coffee"]
                planned = plan(network.model, x.shape)
                executions = variants(network.model) | {"planned": planned}
                tell(f"{network.name}: classifying {len(images)} photographs")
                classes, same = answers(network, executions, images)
                agree &= same
            console.print(classes)
            with progress(network.name) as tell:
                tell("following its memory")
                held = timelines(executions, planned, x)
                panels.append(Panel(network.name, held, position="step"))
                found = compare(
                    executions,
                    x,
                    rounds=rounds,
                    most_seconds=TIMING_SECONDS,
                    # What the figure shows.
                    peaks={name: max(bytes_) for name, (_, bytes_) in held.items()},
                    tell=tell,
                )
            console.print(performance_table(network.name, found, x))
            verdicts.append(f"{network.name}: {found.verdict}")
    path = folder / FIGURE
    draw(panels, path)
    console.print(f"Live memory over the steps of each network: {path}", soft_wrap=True)
    console.print("All executions agree." if agree else "ANSWERS DIFFER.")
    for verdict in verdicts:
        console.print(verdict, soft_wrap=True)
    return 0 if agree else 1


def answers(
    network: Trained, executions: Executions, images: Mapping[str, Tensor]
) -> tuple["Table", bool]:
    """What eager and fused say about each image, and whether all executions agree.

    They do if each image's first class is the same and the logits of all images together are as
    near to the float64 network's as the numerics policy asks. Its yardstick is "folded": weights
    rounded after folding move the logits, whatever runs them.
    """
    x = torch.cat(list(images.values()))
    truth = plain(network.model).double()(x.double())
    logits = {name: run(x) for name, run in executions.items()}
    ours = {name: y for name, y in logits.items() if name not in ("eager", "folded")}
    wrong = {n: why for n, y in ours.items() if (why := why_wrong(y, logits["folded"], truth))}
    made = table(
        *("<photograph", "<eager", "<fused", *logits),
        title=f"{network.name}: most probable class, distance of the logits from float64",
        caption="\n".join([*(f"{name}: {why}" for name, why in wrong.items()), *network.notes]),
    )
    all_same = True
    for i, name in enumerate(images):
        first = {kind: _first_class(network, y[i]) for kind, y in logits.items()}
        differ = [kind for kind in ours if first[kind][0] != first["eager"][0]]
        all_same &= not differ
        made.add_row(
            name,
            "{} {:.3f}".format(*first["eager"]),
            "{} {:.3f}".format(*first["fused"]) + (" (!)" if differ else ""),
            *(f"{(y[i] - truth[i]).abs().max().item():.1e}" for y in logits.values()),
        )
    return made, all_same and not wrong


def _first_class(network: Trained, logits: Tensor) -> tuple[str, float]:
    probability, index = logits.softmax(0).max(0)
    return network.class_names[index], probability.item()


def timelines(executions: Executions, planned: Plan, x: Tensor) -> dict[str, Timeline]:
    """What each execution holds over the steps of the plan, image and result included."""
    found = {}
    for name, run in executions.items():
        if run is planned:
            # A call holds the same from its first step to its last.
            run(x)
            peak = x.nbytes + peak_bytes(lambda run=run: run(x))
            held = [[peak] for _ in planned.steps]
        else:
            held = timeline(run, planned.names, x)
        found[name] = timeline_of(held)
    return found
