"""Which known models gain: eager, folded, fused, and as a plan where there is one."""

import pytest
import torch

from mnv2_kernels import explain, fuse, plan
from mnv2_kernels.profiling.timing import num_threads

from .. import harness

# From those that run as one call to some of which few blocks are fused.
MODELS = (
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:efficientnet_v2_s",
    "torchvision:shufflenet_v2_x1_0",
    "timm:mobilenetv1_100",
    "timm:efficientnet_lite0",
    "timm:mnasnet_100",
    "timm:fbnetc_100",
    "timm:semnasnet_100",
    "timm:hardcorenas_a",
    "timm:lcnet_100",
    "timm:tinynet_a",
    "timm:fbnetv3_b",
    "timm:mobilenetv4_conv_small",
    "timm:mixnet_s",
    "timm:ghostnet_100",
)


@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark, record, name):
    rows = measure_model(name)
    record(rows)
    x, fused = harness.image(3, 224, 1), harness.providers(harness.known_network(name))["fused"]
    with torch.inference_mode(), num_threads(1):
        benchmark.pedantic(fused, (x,), rounds=3, warmup_rounds=1)


def measure_model(name: str, *, resolution: int = 224, rounds: int = 21) -> list[harness.Row]:
    """Rows of suite `models`: one thread, one image."""
    model = harness.known_network(name)
    blocks = explain(fuse(model))
    x = harness.image(3, resolution, 1)
    models = harness.providers(model)
    try:
        models["planned"], why_no_plan = plan(model, x.shape), None
    except ValueError as reason:
        why_no_plan = str(reason)
    return harness.measure(
        {provider: (lambda m=m: m(x)) for provider, m in models.items()},
        x=x,
        expected=harness.truth(model, x),
        flops=harness.counted_flops(models["eager"], x),
        threads=1,
        rounds=rounds,
        suite="models",
        model=name,
        resolution=resolution,
        blocks=len(blocks),
        blocks_fused=sum(row.state == "fused" for row in blocks),
        why_no_plan=why_no_plan,
    )
