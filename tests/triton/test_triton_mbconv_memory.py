"""The kernels around a gate touch nothing but their tensors, and write all of their results."""

from dataclasses import replace

import pytest
import torch
from cases import expect, why_wrong
from memory_bands import BAND, bytes_of, in_bands
from torch import Tensor
from triton_cases import CONFIGS, DEVICE, each_dtype
from triton_mbconv import BLOCKS, inputs, plan

from mnv2_kernels.ops.triton import launch_gate

pytestmark = pytest.mark.sampled(6)

GATED = {name: case for name, case in BLOCKS.items() if case.config.squeeze_channels}
OPTIONS = {"num_warps": 4, "num_stages": 1}


def bands_of(buffer: Tensor) -> Tensor:
    return bytes_of(torch.cat([buffer[:BAND], buffer[-BAND:]])).clone()


@pytest.mark.parametrize("config", [CONFIGS["2x2"], CONFIGS["1x2"]], ids=["x kept", "x read again"])
@each_dtype
@pytest.mark.parametrize("name", GATED)
def test_bands_around_every_tensor(name, dtype, config):
    """All inputs lie between NaNs, which would show in y, and all results between other bytes.

    Results are also what a kernel leaves to the next one: depthwise, sums and gates.
    """
    case = replace(GATED[name], batch=2)
    x, weights = inputs(case, dtype)
    expected = expect(case, x, weights)
    launches = plan(case, config, dtype)
    size = (case.batch, *case.config.output_hw(case.height, case.width))
    hidden = case.config.hidden_channels
    shapes = {
        "kept": (*size, hidden),
        "sums": (case.batch, launches.image_tiles, hidden),
        "gate": (case.batch, hidden),
        "y": (*size, case.config.out_channels),
    }
    results, bands = {}, {}
    for result, shape in shapes.items():
        kind = torch.float32 if result in ("sums", "gate") else dtype
        results[result] = in_bands(torch.full(shape, 77.0, dtype=kind, device=DEVICE), "bytes")
        bands[result] = bands_of(results[result][1])
    tensors = [*weights.tensors(), *weights.gate.tensors()]
    # A missing tensor is one that no kernel may follow.
    nothing = torch.full((1,), torch.nan, dtype=dtype, device=DEVICE)
    inside = [
        in_bands((nothing if t is None else t).contiguous(), "nan")
        for t in (x.permute(0, 2, 3, 1), *tensors)
    ]
    before = [bytes_of(buffer).clone() for _, buffer in inside]
    (image, *own), views = [view for view, _ in inside], [view for view, _ in results.values()]
    launch_gate.run_kernels(launches, OPTIONS, image, own, *views)
    for (_, buffer), right in zip(inside, before, strict=True):
        assert torch.equal(bytes_of(buffer), right), "wrote to its inputs or beside them"
    for result, (view, buffer) in results.items():
        assert torch.equal(bands_of(buffer), bands[result]), f"wrote beside {result}"
        assert not (view == 77).any(), f"left out some of {result}"
    assert why_wrong(results["y"][0].permute(0, 3, 1, 2), expected) is None
