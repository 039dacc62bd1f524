"""Parts `blocks` and `network` of the GPU suite: what is measured, on which inputs."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from mnv2_kernels import InvertedResidual
from mnv2_kernels.block import cost
from mnv2_kernels.block.config import BlockConfig, inverted_residual_config
from mnv2_kernels.ops.backends import choose, cuda_kernel
from mnv2_kernels.ops.triton import configs

from .. import harness
from . import peers, roofline
from .machine import gpu_facts, rates
from .part import NO_TIME, Context, Failed
from .rows import BLOCK_TOLERANCE, NETWORK_TOLERANCE, Workload, measure, rounded, truths
from .timing import input_sets

BATCHES = (256, 32, 1)
DTYPES = (torch.float16, torch.bfloat16)
NETWORK_BATCHES = (256, 1, 32, 1024)
# A workload is not begun with less time left; tuning three kernels takes most of it.
BLOCK_SECONDS, NETWORK_SECONDS = 8, 30
# The most that one provider of the network may take to build.
BUILD_SECONDS = 150
DRY_CONFIG = inverted_residual_config(8, 8, 1, 3)


def images(context: Context, shape: tuple[int, ...], dtype: torch.dtype, sets: int) -> list[Tensor]:
    """Random inputs of shape (N, C, H, W), channels_last, the same in every process."""
    generator = torch.Generator(context.device).manual_seed(1)
    return [
        torch.randn(shape, device=context.device, dtype=dtype, generator=generator).to(
            memory_format=torch.channels_last
        )
        for _ in range(sets)
    ]


def run_blocks(context: Context) -> None:
    """Suite `gpu_blocks`: every distinct block, dtype and batch.

    Raises:
        Failed: a provider was wrong or could not be built; its row says how.
    """
    # The layers at their best: cuDNN times its algorithms once for every shape.
    torch.backends.cudnn.benchmark = True
    if context.dry_run:
        workloads = [(torch.float16, 2, DRY_CONFIG, 6, [1])]
    else:
        workloads = [
            (dtype, batch, config, size, numbers)
            for dtype in DTYPES
            for batch in BATCHES
            for (config, size), numbers in harness.distinct_blocks().items()
        ]
    broken = []
    for dtype, batch, config, size, numbers in workloads:
        labels = {"suite": "gpu_blocks", "block": numbers[0], "batch": batch}
        labels["dtype"] = str(dtype).removeprefix("torch.")
        if context.done(**labels):
            continue
        if context.left() < BLOCK_SECONDS:
            context.skip(**labels, reason=NO_TIME)
            continue
        rows = measure_block(context, config, size, batch=batch, dtype=dtype, blocks=numbers)
        context.keep(rows)
        broken += _complaints(rows, f"block {numbers[0]}, batch {batch}, {labels['dtype']}")
    if broken:
        raise Failed("; ".join(broken))


def measure_block(
    context: Context,
    config: BlockConfig,
    size: int,
    *,
    batch: int,
    dtype: torch.dtype,
    blocks: list[int],
) -> list[harness.Row]:
    """Rows of one block: every provider, in a CUDA graph and as called."""
    model = rounded(harness.block_module(config), dtype)
    tensors = cost.tensor_bytes(config, size, size, batch=batch, itemsize=dtype.itemsize)
    sets = input_sets(tensors.x + tensors.y, gpu_facts().get("l2_bytes", 0))
    inputs = images(context, (batch, config.in_channels, size, size), dtype, sets)
    known = rates(context.device_row(), dtype)
    sizes = {"batch": batch, "itemsize": dtype.itemsize}
    workload = Workload(
        labels={
            "suite": "gpu_blocks",
            "block": blocks[0],
            "blocks": blocks,
            "config": config.name,
            "resolution": size,
            "limit": roofline.limit(
                roofline.block_passes(config, size, execution="fused", **sizes)[0], known
            ),
        },
        inputs=inputs,
        truths=truths(model, inputs),
        tolerance=BLOCK_TOLERANCE,
        floors={
            name: roofline.floor(
                roofline.block_passes(config, size, execution=name, **sizes), known
            )
            for name in cost.EXECUTIONS
        },
        rounds=1 if context.dry_run else 15,
    )
    calls, errors = peers.build(peers.BLOCK_PROVIDERS, model, inputs[0], seconds=context.left)
    rows = measure(context, calls, errors, workload, in_graph=True)
    _, width_out = config.output_hw(size, size)
    for row in rows:
        row |= ran_on(row["provider"], model, inputs[0], width_out)
        row["peak_bytes_computed"] = cost.peak_bytes(
            config, size, size, execution=peers.execution(row["provider"]), **sizes
        )
    return rows


def ran_on(provider: str, block: InvertedResidual, x: Tensor, width_out: int) -> harness.Row:
    """What a row says of the kernel that ran a block: its backend, and which one of that."""
    backend = {"fused-cuda": "cuda", "fused-triton": "triton"}.get(provider)
    if provider == "fused":
        backend = choose(None, x, block.chosen_by) if x.is_cuda else "triton"
    if backend == "cuda":
        return {"backend": backend, "kernel": cuda_kernel(x, block.chosen_by)}
    if backend == "triton":
        choice = configs.choose(block.config, x.dtype, x.device, width_out)
        configuration = {"source": choice.source, **asdict(choice.config)}
        return {"backend": backend, "configuration": configuration}
    return {}


def networks(context: Context) -> Iterator[tuple[int, int]]:
    """(batch, resolution) of the workloads, the most telling first."""
    return iter([(1, 16)] if context.dry_run else [(batch, 224) for batch in NETWORK_BATCHES])


def tiny_network() -> tuple[str, nn.Module]:
    """Two blocks between a stem and a classifier, for a dry run."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        InvertedResidual(8, 8, expand_ratio=2),
        InvertedResidual(8, 12, stride=2, expand_ratio=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    return "tiny", harness.randomise_norms(model, torch.randn(4, 3, 16, 16))


def run_network(context: Context) -> None:
    """Suite `gpu_network`: the whole of MobileNetV2 in fp16, every peer.

    Raises:
        Failed: a provider was wrong or could not be built; its row says how.
    """
    torch.backends.cudnn.benchmark = True
    name, model = tiny_network() if context.dry_run else harness.network()
    model = rounded(model, torch.float16)
    broken = []
    for batch, resolution in networks(context):
        labels = {"suite": "gpu_network", "model": name, "batch": batch}
        if context.done(**labels):
            continue
        if context.left() < NETWORK_SECONDS and not context.dry_run:
            context.skip(**labels, reason=NO_TIME)
            continue
        rows = measure_network(context, name, model, batch, resolution)
        context.keep(rows)
        broken += _complaints(rows, f"batch {batch}")
        torch._dynamo.reset()
        if not context.dry_run:
            torch.cuda.empty_cache()
    if broken:
        raise Failed("; ".join(broken))


def measure_network(
    context: Context, name: str, model: nn.Module, batch: int, resolution: int
) -> list[harness.Row]:
    """Rows of one batch size, timed as called; providers ending in -graph replay a CUDA graph."""
    dtype = torch.float16
    shape = (batch, 3, resolution, resolution)
    sets = input_sets(2 * batch * 3 * resolution**2, gpu_facts().get("l2_bytes", 0), most=8)
    inputs = images(context, shape, dtype, sets)
    known = rates(context.device_row(), dtype)
    workload = Workload(
        labels={"suite": "gpu_network", "model": name, "resolution": resolution},
        inputs=inputs,
        truths=truths(model, inputs),
        tolerance=NETWORK_TOLERANCE,
        floors={
            execution: roofline.floor(
                roofline.network_passes(1.0, resolution, execution=execution, batch=batch), known
            )
            for execution in cost.EXECUTIONS
        },
        rounds=1 if context.dry_run else 15,
    )
    calls, errors = peers.build(
        peers.NETWORK_PROVIDERS,
        model,
        inputs[0],
        seconds=lambda: min(BUILD_SECONDS, context.left() - NETWORK_SECONDS / 2),
    )
    return measure(
        context,
        calls,
        errors,
        workload,
        in_graph=False,
        with_memory=peers.BLOCK_PROVIDERS.__contains__,
    )


def _complaints(rows: list[harness.Row], where: str) -> list[str]:
    """Errors of providers; raises at once where the process has lost the GPU."""
    errors = {row["provider"]: row["error"] for row in rows if "error" in row}
    for row in rows:
        if "seconds" in row:
            microseconds = row["seconds"]["50%"] * 1e6
            print(
                f"{where}: {row['provider']:<16} {microseconds:>10.1f} us"
                f" {row['share_of_floor']:>5.0%} of floor",
                flush=True,
            )
    if peers.lost(errors.values()):
        raise Failed(f"{where}: the GPU is lost to this process: {errors}")
    return [
        f"{where}: {name}: {error}"
        for name, error in errors.items()
        if peers.NEEDS_GPU not in error
    ]
