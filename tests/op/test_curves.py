"""How near the curves of the CPU kernels are to those of real numbers, one number after the other.

Blocks without an expansion whose depthwise and projection leave all numbers as they are: y is
curve(x). The kernels of narrower instruction sets run in child processes:
`python test_curves.py measure`, with ATEN_CPU_CAPABILITY set.
"""

import json
import os
import subprocess
import sys
from math import inf, nan, pi

import cases
import pytest
import torch
from cpu_driver import kernels_here
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import CURVES, NO_CLIP

pytestmark = [
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
    cases.once,
]

SHORT = [torch.bfloat16, torch.float16]
SPECIAL = {
    # x: the right results; zero is anything below 1e-36.
    nan: dict.fromkeys(CURVES, nan),
    inf: dict.fromkeys(CURVES, inf),
    -inf: {"hardswish": nan, "silu": 0.0, "gelu": 0.0, "gelu_tanh": 0.0},
    0.0: dict.fromkeys(CURVES, 0.0),
    **{x: dict.fromkeys(CURVES, 0.0) for x in (-1e3, -1e10, -1e30, -3e38)},
    **{x: dict.fromkeys(CURVES, x) for x in (1e3, 1e10, 1e30, 3e38)},
}


def through(place: str, curve: str, x: Tensor, channels: int = 16) -> Tensor:
    """curve(x) of numbers (count,), by a block with the curve behind one of its layers."""
    dtype, eye = x.dtype, torch.eye(channels, dtype=x.dtype)
    taps = torch.zeros(3, 3, channels, dtype=dtype)
    taps[1, 1] = 1
    after = {f"clip_{name}": NO_CLIP for name in ("expand", "dw", "project")} | {place: curve}
    expand = eye if place == "clip_expand" else None
    weights = FoldedWeights(expand, None, taps, None, eye, None, **after)
    width = 64 if len(x) % (64 * channels) == 0 else 1
    images = x.view(1, -1, width, channels).permute(0, 3, 1, 2)
    settings = {"stride": 1, "padding": (1,) * 4, "dilation": 1, "residual": False}
    y = cases.run("cpu", images, weights, **settings)
    return y.permute(0, 2, 3, 1).flatten()


PLACES = ("clip_expand", "clip_dw", "clip_project")


def numbers(count: int) -> Tensor:
    """Even, normal, and of every size from 1e-40 to 100, in 4 parts; float32."""
    part = count // 4
    sizes = 10 ** torch.empty(part, dtype=torch.float64).uniform_(-40, 2)
    signs = torch.randint(0, 2, (part,)) * 2 - 1
    even = torch.empty(2 * part).uniform_(-100, 100)
    return torch.cat([even, torch.randn(part), (sizes * signs).float()])


def ulp(x: Tensor) -> Tensor:
    """Of float32, at numbers of float64."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent.clamp(min=-125) - 24)


def precise(curve: str, x: Tensor) -> Tensor:
    """In float64, without PyTorch's differences of nearly equal numbers far below 0."""
    match curve:
        case "hardswish":
            return x * ((x + 3).clamp(0, 6) / 6)
        case "silu":
            return x * torch.sigmoid(x)
        case "gelu":
            return x * torch.special.erfc(x * -(0.5**0.5)) / 2
    return x * torch.sigmoid((8 / pi) ** 0.5 * x * (1 + 0.044715 * x * x))


def truth_and_slope(curve: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """In float64."""
    leaf = x.double().requires_grad_()
    y = precise(curve, leaf)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach(), slope


def allowed(curve: str, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """Errors of the input's last place, and 5 of the result's; more of it far below zero."""
    rule = ulp(x.double()) * slope.abs() + 5 * ulp(y)
    if curve in ("silu", "hardswish"):
        return torch.where(x > -5, rule, 4 * rule) + 1e-36
    factor = {"gelu": 2.5, "gelu_tanh": 1.5}[curve]
    of_x = 5e-7 * x.double().abs() * (x > -100)
    return torch.where(x > -5, torch.minimum(factor * rule, of_x), of_x) + 1e-36


def worst_single(curve: str, count: int) -> dict[str, float]:
    """Errors in parts of what is allowed; and how many bits are others at another place."""
    x = numbers(count)
    y = {place: through(place, curve, x) for place in PLACES}
    truth, slope = truth_and_slope(curve, x)
    share = (y["clip_dw"].double() - truth).abs() / allowed(curve, x, truth, slope)
    odd = through("clip_dw", curve, x[: count // 4 // 19 * 19], 19)
    return {
        "share": share.max().item(),
        "above -5": share[x > -5].max().item(),
        "other places": sum((y[place] != y["clip_dw"]).sum().item() for place in PLACES),
        "other widths": (odd != y["clip_dw"][: len(odd)]).sum().item(),
    }


def every_number(dtype: torch.dtype) -> Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return bits.where(bits.isfinite(), 0)


def worst_short(curve: str, dtype: torch.dtype) -> dict[str, float]:
    """Distances from the results that are rounded right, in units in their last place."""
    x = every_number(dtype)
    truth, slope = truth_and_slope(curve, x)
    single = allowed(curve, x, truth, slope).nan_to_num()
    right, info = truth.to(dtype), torch.finfo(dtype)
    _, exponents = torch.frexp(right.double().abs().clamp_min(info.smallest_normal))
    unit = torch.ldexp(torch.full_like(truth, info.eps), exponents - 1)
    found = {}
    for place in PLACES:
        y = through(place, curve, x)
        # Pairs of bfloat16 numbers are multiplied as if there were none below the normal ones.
        tiny = info.smallest_normal if dtype == torch.bfloat16 else 0
        apart = ((y.double() - right.double()).abs() - tiny - single).clamp(min=0) / unit
        apart = apart.where(right.isfinite() | y.isfinite(), 0)
        found[place] = apart.max().item()
    return found


def specials(curve: str) -> dict[str, float]:
    """Each as an image of one pixel and channel, so that no other number is in its sums."""
    return {
        str(x): through("clip_dw", curve, torch.tensor([x]), 1).item() for x in (*SPECIAL, -0.0)
    }


def measure() -> None:
    count = 2**24 if cases.LONG else 2**20
    for curve in CURVES:
        torch.manual_seed(0)
        found = {
            "curve": curve,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "single": worst_single(curve, count),
            "short": {str(dtype): worst_short(curve, dtype) for dtype in SHORT},
            "special": specials(curve),
        }
        print(json.dumps(found), flush=True)


@pytest.fixture(scope="module", params=kernels_here())
def measured(request, tmp_path_factory):
    """What was measured of every curve, on one of the kernels."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if request.param != "neon":
        variables["ATEN_CPU_CAPABILITY"] = request.param
    command = [sys.executable, "-W", "ignore", __file__, "measure"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if request.param != "neon":
        assert {line["capability"].lower() for line in lines} == {request.param}
    return {line.pop("curve"): line for line in lines}


curves = pytest.mark.parametrize("curve", CURVES)


@curves
def test_float32(measured, curve):
    """Errors of a few last places, and the same bits behind every layer at any channel count."""
    found = measured[curve]["single"]
    assert found["share"] <= 1, found
    assert found["other places"] == found["other widths"] == 0, found


@curves
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_number_of_16_bits(measured, curve, dtype):
    """A last place beyond the right one at most, where float32 was not off by more already."""
    assert max(measured[curve]["short"][str(dtype)].values()) <= 1, measured[curve]["short"]


@curves
def test_special_values(measured, curve):
    found = measured[curve]["special"]
    wrong = {}
    for x, right in SPECIAL.items():
        y, truth = torch.tensor(found[str(x)]), torch.tensor(right[curve])
        if not torch.isclose(y, truth, rtol=1e-6, atol=1e-36, equal_nan=True):
            wrong[x] = y.item()
    assert not wrong
    assert found["-0.0"] == 0


@curves
def test_the_rule_finds_what_it_must(curve):
    """Errors of a few more last places, and another curve."""
    x = numbers(2**12)
    y, slope = truth_and_slope(curve, x)
    bound = allowed(curve, x, y, slope)
    normal = (y.abs() > 1e-28) & (x > -5) & (x.abs() < 100)
    more = 20 * ulp(y) + 4 * slope.abs() * ulp(x.double())
    assert (more[normal] > bound[normal]).all()
    for other in set(CURVES) - {curve}:
        assert ((precise(other, x.double()) - y).abs() > bound).any()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
