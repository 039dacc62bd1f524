"""One way to measure everything: check, then time in turns, then divide by a bound.

A row of results is one provider on one workload, a JSON object a line in results/<suite>.jsonl;
benchmarks/README.md says what its fields mean.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mnv2_kernels import InvertedResidual, mobilenet_v2
from mnv2_kernels.block import cost
from mnv2_kernels.block.config import BlockConfig, mobilenet_v2_block_inputs
from mnv2_kernels.cli.named_models import import_torchvision, named_model
from mnv2_kernels.profiling.memory import peak_bytes_again
from mnv2_kernels.profiling.timing import fma_peak, interleave, num_threads, quartiles, speedup
from mnv2_kernels.profiling.variants import plain, variants

from .machine import facts

Row = dict[str, object]
Call = Callable[[], Tensor]

RESULTS = Path(__file__).parent / "results"
BLOCKS = list(mobilenet_v2_block_inputs())
# Widths and resolutions (rows and columns of the image) of the paper, and wider; and those whose
# share of the peak all others are held against.
SIZES = tuple(product((0.35, 0.5, 0.75, 1.0, 1.3, 1.4), (96, 128, 160, 192, 224)))
REFERENCE_SIZE = (1.0, 224)
# Of the largest value. Float32 is near 1e-6; a tap or a channel too few is above 1e-2.
TOLERANCE = 1e-4


def distinct_blocks() -> dict[tuple[BlockConfig, int], list[int]]:
    """(block, size of its input) -> its numbers in the network, from 1."""
    found: dict[tuple[BlockConfig, int], list[int]] = {}
    for number, workload in enumerate(BLOCKS, 1):
        found.setdefault(workload, []).append(number)
    return found


def block_module(config: BlockConfig) -> nn.Module:
    """The block in evaluation mode with random weights, with both clips of ReLU6 at work."""
    torch.manual_seed(0)
    module = InvertedResidual(
        config.in_channels,
        config.out_channels,
        stride=config.stride,
        expand_ratio=config.hidden_channels / config.in_channels,
        kernel_size=config.kernel_size,
    )
    return randomise_norms(module, torch.randn(4, config.in_channels, 14, 14))


@torch.no_grad()
def randomise_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Give every batch norm the statistics of x, and weights that reach below 0 and above 6."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain average: after one batch, the statistics of that batch
            module.weight.uniform_(1, 4)
            module.bias.normal_(2, 1)
    model.train()(x)
    return model.eval()


@lru_cache(maxsize=1)
def network() -> tuple[str, nn.Module]:
    """(name, MobileNetV2 1.0 with random weights): torchvision's where it can be imported."""
    torch.manual_seed(0)
    try:
        name, model = (
            "torchvision mobilenet_v2",
            import_torchvision("torchvision.models").mobilenet_v2(),
        )
    except ImportError:
        name, model = "mnv2_kernels mobilenet_v2", mobilenet_v2()
    return name, randomise_norms(model, torch.randn(4, 3, 96, 96))


def network_of_width(width: float) -> nn.Module:
    """This package's MobileNetV2 with random weights, the same in every process."""
    torch.manual_seed(0)
    model = mobilenet_v2(width)
    return randomise_norms(model, torch.randn(4, 3, 96, 96))


@lru_cache(maxsize=1)
def known_network(name: str) -> nn.Module:
    """A network by the name that `named_model` takes, the same random weights in every process."""
    torch.manual_seed(0)
    return randomise_norms(named_model(name), torch.randn(4, 3, 96, 96))


@cache
def known_network_flops(name: str, resolution: int) -> int:
    """Of one image: two per multiply-add of convolutions and fully connected layers."""
    return counted_flops(known_network(name), image(3, resolution, 1))


@torch.inference_mode()
def counted_flops(model: nn.Module, x: Tensor) -> int:
    """As PyTorch counts them while the model runs layer by layer."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def providers(model: nn.Module) -> dict[str, nn.Module]:
    """The competitors, all channels_last: fused, folded (batch norm in convolutions), eager."""
    copies = variants(model)
    eager = copies["eager"].to(memory_format=torch.channels_last)
    return {"fused": copies["fused"], "folded": copies["folded"], "eager": eager}


def image(channels: int, size: int, batch: int) -> Tensor:
    """Random x (batch, channels, size, size), channels_last, the same in every process."""
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


@torch.no_grad()
def truth(model: nn.Module, x: Tensor) -> Tensor:
    """What the layers give in float64."""
    return plain(deepcopy(model)).double()(x.double())


def largest_error(y: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value; raises where it is no rounding error."""
    error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise AssertionError(f"largest error must be at most {TOLERANCE:g}, got {error:.2e}")
    return error


@torch.inference_mode()
def measure(
    calls: Mapping[str, Call],
    *,
    x: Tensor,
    expected: Tensor,
    flops: int,
    threads: int,
    rounds: int,
    repeats: int = 1,
    computed_peaks: Mapping[str, int] | None = None,
    **labels: object,
) -> list[Row]:
    """Check every call, time them in turns, measure their memory: one row a provider.

    Args:
        calls: by provider; each gives the result for x.
        expected: that result in float64.
        flops: of one call, from `cost`.
        computed_peaks: peak bytes by provider, from `cost`; the input included.
        labels: what else the rows say about the workload.
    """
    with num_threads(threads):
        errors = {name: largest_error(call(), expected) for name, call in calls.items()}
        # The clock may change while the calls run, so the bound is taken on both sides of them.
        before = fma_peak()
        samples = interleave(calls, rounds=rounds, repeats=repeats)
        after = fma_peak()
        peaks = {name: x.nbytes + peak_bytes_again(call) for name, call in calls.items()}
    bound = None if before is None else max(before, after)
    rows = []
    for name in calls:
        lower, middle, upper = quartiles(samples[name])
        rate = flops / middle / 1e9
        rows.append(
            {
                **labels,
                "provider": name,
                "batch": x.shape[0],
                "dtype": str(x.dtype).removeprefix("torch."),
                "threads": threads,
                "seconds": {"25%": lower, "50%": middle, "75%": upper},
                "rounds": rounds,
                "repeats": repeats,
                "gflops": rate,
                "fma_peak_gflops": bound,
                "share_of_fma_peak": rate / bound if bound else None,
                "speedup": {
                    other: speedup(samples[name], samples[other])
                    for other in calls
                    if other != name
                },
                "peak_bytes": peaks[name],
                "peak_bytes_computed": (computed_peaks or {}).get(name),
                "largest_error": errors[name],
                **facts(),
            }
        )
    return rows


@lru_cache(maxsize=4)
def block_workload(number: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(module, x, result in float64) of block 1 to 17 in a 224x224 network."""
    config, size = BLOCKS[number - 1]
    module = block_module(config)
    x = image(config.in_channels, size, batch)
    return module, x, truth(module, x)


def measure_block(
    number: int, *, batch: int, threads: int, rounds: int, repeats: int, only_fused: bool = False
) -> list[Row]:
    """Rows of suite `block` for block 1 to 17."""
    config, size = BLOCKS[number - 1]
    module, x, expected = block_workload(number, batch)
    models = {"fused": module} if only_fused else providers(module)
    return measure(
        {name: (lambda m=m: m(x)) for name, m in models.items()},
        x=x,
        expected=expected,
        flops=cost.flops(config, size, size, batch=batch),
        threads=threads,
        rounds=rounds,
        repeats=repeats,
        computed_peaks={
            execution: cost.peak_bytes(config, size, size, execution=execution, batch=batch)
            for execution in cost.EXECUTIONS
        },
        suite="block",
        block=number,
        config=config.name,
        resolution=size,
    )


def append(rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Add rows to the file of their suite."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with open(folder / f"{row['suite']}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def load(suite: str, folder: Path = RESULTS) -> list[Row]:
    """All rows of a suite, oldest first."""
    path = folder / f"{suite}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios; of no values, an error."""
    logarithms = [math.log(v) for v in values]
    return math.exp(sum(logarithms) / len(logarithms))
