"""Which known models gain: eager, folded, fused, and as a plan where there is one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mnv2_kernels import explain, fuse, plan
from mnv2_kernels.cli.named_models import named_model
from mnv2_kernels.profiling.timing import num_threads

from .. import harness

# From those that run as one call to one of which nothing is fused.
MODELS = (
    "torchvision:mobilenet_v2",
    "timm:mobilenetv1_100",
    "timm:efficientnet_lite0",
    "timm:mnasnet_100",
    "timm:fbnetc_100",
    "torchvision:shufflenet_v2_x1_0",
    "timm:mobilenetv4_conv_small",
    "timm:semnasnet_100",
    "torchvision:mobilenet_v3_large",
    "timm:hardcorenas_a",
    "timm:ghostnet_100",
    "torchvision:efficientnet_b0",
)


@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark, record, name):
    rows = measure_model(name)
    record(rows)
    x, fused = harness.image(3, 224, 1), harness.providers(model_of(name))["fused"]
    with torch.inference_mode(), num_threads(1):
        benchmark.pedantic(fused, (x,), rounds=3, warmup_rounds=1)


def model_of(name: str) -> torch.nn.Module:
    """The model with random weights, the same in every process."""
    torch.manual_seed(0)
    return harness.randomise_norms(named_model(name), torch.randn(4, 3, 96, 96))


def measure_model(name: str, *, resolution: int = 224, rounds: int = 21) -> list[harness.Row]:
    """Rows of suite `models`: one thread, one image."""
    model = model_of(name)
    blocks = explain(fuse(model))
    x = harness.image(3, resolution, 1)
    models = harness.providers(model)
    try:
        models["planned"], why_no_plan = plan(model, x.shape), None
    except ValueError as reason:
        why_no_plan = str(reason)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        models["eager"](x)
    return harness.measure(
        {provider: (lambda m=m: m(x)) for provider, m in models.items()},
        x=x,
        expected=harness.truth(model, x),
        flops=counter.get_total_flops(),
        threads=1,
        rounds=rounds,
        suite="models",
        model=name,
        resolution=resolution,
        blocks=len(blocks),
        blocks_fused=sum(row.state == "fused" for row in blocks),
        why_no_plan=why_no_plan,
    )
