"""Memory of whole networks: arithmetic and the allocator's events, held together step by step."""

import json
import re
import sys
from dataclasses import replace
from functools import cache

import cases
import pytest
import torch
from PIL import Image
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.block.config import BlockConfig
from mnv2_kernels.cli.named_models import named_model
from mnv2_kernels.network import figures, memory
from mnv2_kernels.network.plan import why_not_on_cpu
from mnv2_kernels.network.program import Block, Linear, Pool, Stem, Step
from mnv2_kernels.ops import optional
from mnv2_kernels.profiling import memory_report, timing
from mnv2_kernels.profiling.memory import allocations

pytestmark = pytest.mark.sampled(2)

needs_cpu_kernel = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

# A small network, in elements: x 3x8x8, then 4x4x4, 2x4x4, 2x4x4 (residual), 6x2x2, 5, 3.
CHAIN = [
    Step(Stem(3, 4, (1, 1, 1, 1), None, None, (0, 6))),
    Step(Block(BlockConfig(4, 8, 2), None)),
    Step(Block(BlockConfig(2, 4, 2, residual=True), None)),
    Step(Block(BlockConfig(2, 4, 6, stride=2), None)),
    Step(Pool(6, 5, torch.zeros(6, 5), None, (0, 6))),
    Step(Linear(5, 3, None, None)),
]
IMAGE = (3, 8, 8)


def test_live_bytes_counted_by_hand():
    image = 192
    fused = [192 + 64, 64 + 32, 32 + 32, 32 + 24, 24 + 20, 5 + 3]
    folded = [192 + 64, 64 + 128 + 128, 32 + 64 + 64, 32 + 64 + 16, 24 + 20, 5 + 3]
    eager = [192 + 128, 64 + 128 + 128, 32 + 64 + 64, 32 + 64 + 64, 24 + 40, 5 + 3]
    for execution, elements in (("fused", fused), ("folded", folded), ("eager", eager)):
        live = memory.live_bytes(CHAIN, IMAGE, execution=execution)
        with_image = [elements[0], *(n + image for n in elements[1:])]
        assert live == [4 * n for n in with_image], execution
        half = memory.live_bytes(CHAIN, IMAGE, execution=execution, batch=3, itemsize=2)
        assert half == [6 * n for n in with_image], execution


def test_the_papers_bound_counted_by_hand():
    # Stem 192 + 64 elements, more than block 1 with 64 + 32 + (16 + 16).
    assert memory.paper_bound(CHAIN, IMAGE) == 4 * 256
    assert memory.paper_bound(CHAIN[1:], (4, 4, 4)) == 4 * 128
    assert memory.paper_bound(CHAIN[1:], (4, 4, 4), batch=2) == 4 * (2 * 96 + 32)
    assert memory.paper_bound(CHAIN[4:], (6, 2, 2)) == 4 * (24 + 5 + 4)


def test_tensors_that_a_plan_uses_counted_by_hand():
    steps = [
        Step(CHAIN[0].layer, streams=True),
        Step(CHAIN[1].layer, offset=16),
        Step(CHAIN[2].layer, offset=16),  # in place
        Step(CHAIN[3].layer, offset=0),
        Step(CHAIN[4].layer, offset=48),
        Step(CHAIN[5].layer),
    ]
    lines = [100, 0, 0, 0, 0, 0]
    elements = [32, 32, 32, 32 + 24, 24 + 5, 5 + 3]
    used = memory.planned_in_use(steps, IMAGE, lines)
    assert used == [4 * (192 + n) + 100 * (i < 2) for i, n in enumerate(elements)]


@pytest.mark.parametrize(
    "batch, threads, block",
    [(1, 1, 110), (5, 1, 110), (1, 2, 130), (2, 2, 220), (3, 2, 220), (3, 8, 130)],
)
def test_threads_take_whole_images_while_there_are_enough(batch, threads, block):
    held = memory.planned_bytes(
        image=7,
        result=3,
        arena=100,
        lines_of_one=10,
        lines_of_all=10 if threads == 1 else 30,
        batch=batch,
        threads=threads,
    )
    assert held == 10 * batch + block


class Stages(nn.Module):
    """An image through two layers, whose results are 4 and then 2 channels; and a list."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(nn.Conv2d(4, 2, 1)))
        self.parts = nn.ModuleList([nn.Flatten()])

    def forward(self, x):
        return self.parts[0](self.stages(x))


def test_events_are_those_of_the_step_that_runs():
    model, x = Stages().eval(), torch.randn(1, 1, 64, 64)
    names = ("stages.0", "stages.1.0", "nowhere", "parts.0")
    with torch.inference_mode():
        first, second, nowhere, third = memory_report.timeline(model, names, x)
        sizes = allocations(lambda: model(x))
    image = x.nbytes
    assert nowhere is None
    assert first[0] == image and max(first) >= 5 * image and first[-1] == 5 * image
    # The first result is read by the second layer, and released after it.
    assert second[0] == 5 * image and max(second) >= 7 * image and second[-1] == 3 * image
    assert set(third) == {3 * image}
    assert 1 not in sizes, "no mark is left behind"


@cache
def report(name, width, resolution, batch, threads):
    with timing.num_threads(threads):
        model = named_model(name, width)
        plan = mk.plan(model, (3, resolution, resolution))
        return model, plan, memory_report.measure(name, model, plan, batch)


NETWORKS = [
    ("mobilenet_v2", 1.0, 224, 1),
    ("mobilenet_v2", 0.35, 96, 3),
    ("mobilenet_v2", 1.4, 97, 2),
    ("torchvision:mobilenet_v2", 0.5, 160, 2),
    ("timm:mobilenetv2_100", None, 128, 1),
    ("timm:efficientnet_lite0", None, 128, 1),
]


@needs_cpu_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: "-".join(map(str, n)))
def test_a_plan_holds_what_is_computed_to_the_byte(network, threads):
    _, plan, found = report(*network, threads)
    planned = found.executions["planned"]
    assert planned.peak_measured == planned.peak_computed
    assert planned.peak_computed >= plan.arena_bytes + plan.line_bytes(1)
    if threads == 1:
        assert planned.peak_measured < found.executions["fused"].peak_measured


@needs_cpu_kernel
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: "-".join(map(str, n)))
def test_unfused_networks_hold_at_least_what_is_computed(network):
    """At most one hidden tensor more, which the module around the depthwise holds where batch norm
    is not folded, and the depthwise weights, which oneDNN copies.
    """
    batch = network[3]
    _, plan, found = report(*network, 1)
    for execution in ("eager", "folded"):
        held = found.executions[execution]
        for i, step in enumerate(plan.steps):
            if not isinstance(step.layer, Block):
                continue
            c, shape = step.layer.config, plan.rows()[i].shape
            bound = 4 * c.kernel_size**2 * c.hidden_channels
            if execution == "eager":
                bound += 4 * batch * c.hidden_channels * shape[1] * shape[2]
            assert 0 <= held.measured[i] - held.computed[i] <= bound, (execution, plan.names[i])


SCRATCH_OF_BLOCKS = """
import sys
import torch
from mnv2_kernels.profiling import memory_report
from mnv2_kernels import plan
from mnv2_kernels.cli.named_models import named_model

name, width, resolution, batch = sys.argv[1:]
torch.set_num_threads(1)
model = named_model(name, None if width == "None" else float(width))
schedule = plan(model, (3, int(resolution), int(resolution)))
found = memory_report.measure(name, model, schedule, int(batch)).executions["fused"]
for name, measured, computed in zip(schedule.names, found.measured, found.computed, strict=True):
    print(name, measured - computed)
"""


@needs_cpu_kernel
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: "-".join(map(str, n)))
def test_fused_blocks_hold_what_is_computed_and_the_kernels_scratch(network, python):
    """To the byte, with the scratch as the kernel itself says it."""
    _, plan, _ = report(*network, 1)
    done = python("-c", SCRATCH_OF_BLOCKS, *map(str, network), MNV2_PRINT_CONFIGS="1")
    assert done.returncode == 0, done.stderr
    excess = dict(line.split() for line in done.stdout.splitlines())
    printed = re.findall(
        r"(\d+)x(\d+) (\d+)-(\d+)-(\d+) k(\d) s(\d):.* scratch (\d+) bytes", done.stderr
    )
    scratch = {tuple(map(int, sizes)): int(bytes_) for *sizes, bytes_ in printed}
    shape, blocks = plan.input_shape, 0
    for name, step in zip(plan.names, plan.steps, strict=True):
        if isinstance(step.layer, Block):
            c = step.layer.config
            channels = (c.in_channels, c.hidden_channels, c.out_channels)
            key = (*shape[1:], *channels, c.kernel_size, c.stride)
            assert int(excess[name]) == scratch[key], name
            blocks += 1
        shape = step.layer.output_shape(shape)
    assert blocks >= 16


@needs_cpu_kernel
def test_blocks_in_wrappers_are_measured_as_they_run():
    """Of EfficientNet's blocks torchvision's names are those of an inner Sequential: a mark there
    would be a hook inside a fused block.
    """
    _, plan, found = report("torchvision:efficientnet_b0", None, 64, 1, 1)
    held = found.executions["fused"]
    for step, row, measured, computed in zip(
        plan.steps, plan.rows(), held.measured, held.computed, strict=True
    ):
        if isinstance(step.layer, Block):
            kept = 4 * step.layer.config.hidden_channels * row.shape[1] * row.shape[2]
            assert kept <= measured - computed <= kept + 300 * 1024


@needs_cpu_kernel
def test_figures_of_issue_5():
    """The paper's 200 kB at 16 bit are 401,408 bytes of float32: all that the arena may take."""
    model, plan, found = report("mobilenet_v2", 1.0, 224, 1, 1)
    assert found.arena_bytes == plan.arena_bytes <= 401_408
    assert found.line_bytes == plan.line_bytes(1) <= 512 * 1024
    # Block 1, its 32 hidden channels one by one.
    assert found.paper_bound == 4 * 112 * 112 * (32 + 16 + 1)
    peaks = [held.peak_measured for held in found.executions.values()]
    assert list(found.executions) == list(memory_report.EXECUTIONS)
    assert peaks == sorted(peaks, reverse=True)
    assert found.weight_bytes > 4 * sum(p.numel() for p in model.parameters())


@needs_cpu_kernel
@pytest.mark.parametrize(
    "dtype, size, batch, threads",
    [
        (torch.bfloat16, 224, 1, 1),
        (torch.bfloat16, 64, 3, 2),
        (torch.float16, 64, 3, 1),
        (torch.float64, 64, 3, 2),
    ],
)
def test_other_dtypes(dtype, size, batch, threads):
    """Tensors in proportion to float32's; kernels that do not run a dtype are not measured."""
    model, single, wide = report("mobilenet_v2", 1.0, size, batch, threads)
    reason = why_not_on_cpu(dtype)
    assert (reason is not None) == (dtype == torch.float64)
    with timing.num_threads(threads):
        plan = single if reason else mk.plan(model, single.input_shape, dtype=dtype)
        found = memory_report.measure("mobilenet_v2", model, plan, batch, dtype)
    assert found.dtype == dtype and next(model.parameters()).dtype == torch.float32
    ratio = dtype.itemsize / 4
    assert 0 <= found.arena_bytes - ratio * wide.arena_bytes < 64
    assert found.arena_bytes == 200_704 or size != 224
    assert found.paper_bound == ratio * wide.paper_bound
    for execution in ("eager", "folded", "fused"):
        held = found.executions[execution]
        assert held.computed == [ratio * n for n in wide.executions[execution].computed]
        if execution != "fused" or reason is None:
            pairs = zip(held.measured, held.computed, strict=True)
            assert all(measured >= computed for measured, computed in pairs)
    planned, single_planned = found.executions["planned"], wide.executions["planned"]
    if reason is None:
        assert planned.peak_measured == planned.peak_computed < single_planned.peak_computed
    else:
        tensors = batch * (3 * size * size + 1000) * 4 + threads * wide.arena_bytes
        more = planned.peak_computed - single_planned.peak_computed
        assert more == (ratio - 1) * tensors
        for execution in ("fused", "planned"):
            held = found.executions[execution]
            assert held.why_not_measured == reason and held.peak_measured is None
            assert held.measured == [None] * 20


@needs_cpu_kernel
def test_a_plan_of_another_dtype_is_refused():
    model, _, _ = report("mobilenet_v2", 0.35, 96, 3, 1)
    plan = mk.plan(model, (3, 96, 96))
    plan._program.weights[:] = [w.double() for w in plan._program.weights]
    with pytest.raises(ValueError, match="plan must be one of torch.float32, got one of torch.fl"):
        memory_report.measure("mobilenet_v2", model, plan)


@needs_cpu_kernel
def test_an_owned_arena_counts():
    model, _, by_call = report("mobilenet_v2", 0.35, 96, 3, 1)
    with timing.num_threads(1):
        plan = mk.plan(model, (3, 96, 96), own_arena=True)
        found = memory_report.measure("mobilenet_v2", model, plan, 3)
    # Calls that allocate their memory keep what the classifier reads of all three images.
    kept = 3 * 4 * 1280
    measured = [held + kept for held in found.executions["planned"].measured]
    assert measured == by_call.executions["planned"].measured


@needs_cpu_kernel
def test_figure_without_what_is_not_measured(tmp_path):
    """No green and no blue where fused and planned are left out."""
    model, plan, _ = report("mobilenet_v2", 0.35, 96, 3, 1)
    found = memory_report.measure("mobilenet_v2", model, plan, 1)
    left_out = {
        name: memory_report.Memory(held.computed, [None] * 20, ([], []), "no kernel")
        for name, held in found.executions.items()
        if name in ("fused", "planned")
    }
    replace(found, executions=found.executions | left_out).figure(tmp_path / "memory.png")
    colours = colours_of(tmp_path / "memory.png")
    assert {(127, 127, 127), (255, 127, 14)} <= colours
    assert not {(31, 119, 180), (44, 160, 44)} & colours


@needs_cpu_kernel
def test_the_document_holds_every_figure():
    _, plan, found = report("mobilenet_v2", 0.35, 96, 3, 1)
    document = json.loads(json.dumps(found.document()))
    assert document["x_shape"] == [3, 3, 96, 96]
    assert document["steps"] == list(plan.names)
    for name, held in found.executions.items():
        written = document["executions"][name]
        assert written["by_step"] == held.measured and max(held.measured) == written["peak_bytes"]
        assert written["computed_by_step"] == held.computed
        assert written["peak_bytes_computed"] == max(held.computed)


def colours_of(path):
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(2**20)}


@needs_cpu_kernel
def test_figure_of_a_report(tmp_path):
    _, _, found = report("mobilenet_v2", 0.35, 96, 3, 1)
    found.figure(tmp_path / "memory.png")
    # matplotlib's C7, C1, C0 and C2: eager, folded, fused, planned; black is the bound.
    lines = {(127, 127, 127), (255, 127, 14), (31, 119, 180), (44, 160, 44), (0, 0, 0)}
    assert lines <= colours_of(tmp_path / "memory.png")


@needs_cpu_kernel
def test_figure_of_a_plan(tmp_path):
    _, plan, _ = report("mobilenet_v2", 1.0, 224, 1, 1)
    plan.figure(tmp_path / "plan.PNG")
    colours = colours_of(tmp_path / "plan.PNG")
    assert {(127, 127, 127), (44, 160, 44), (0, 0, 0)} <= colours
    assert (255, 127, 14) not in colours


def test_a_figure_without_matplotlib_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(optional.util, "find_spec", lambda name: None)
    panel = figures.Panel("network", {"eager": ([0, 1], [1, 1])})
    with pytest.raises(optional.MissingPackage, match="needs matplotlib.*pip install matplotlib"):
        figures.draw([panel], tmp_path / "memory.png")


@needs_cpu_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fresh_process_grows_by_what_the_allocator_says(python):
    """By no less than the tensors of the one call, but for pages.

    The fused model is measured layer by layer where a profiler counts, and runs as one call here.
    """
    grown = {}
    for execution in memory_report.EXECUTIONS:
        done = python("-m", "benchmarks.resident", execution, "--resolution=224", "--batch=4")
        assert done.returncode == 0, done.stderr
        grown[execution] = int(done.stdout)
    peaks = {
        name: held.peak_measured
        for name, held in report("mobilenet_v2", 1.0, 224, 4, 1)[2].executions.items()
    }
    for execution, bytes_ in grown.items():
        least = peaks["planned" if execution == "fused" else execution]
        assert bytes_ >= 0.9 * least, execution
    assert grown["planned"] < 2 * peaks["planned"]
    assert grown["fused"] < 0.9 * peaks["fused"]
    assert max(grown["planned"], grown["fused"]) < grown["eager"]
