"""Random calls of the Triton kernel in random configurations against the float64 reference."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import torch
from cases import LONG, Case
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_calls import calls, layouts
from triton_cases import DEVICE, DTYPES, HAS_GPU, QUICK, make_inputs, run_config, steps

from mnv2_kernels.ops import reference
from mnv2_kernels.ops.triton.configs import PatchConfig

CHANNELS = st.integers(1, 40)
SIZES = st.integers(1, 11)
# Far above what rounding makes of values of this size, far below what a missing tap makes.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2.5e-1}


@st.composite
def small_calls(draw) -> Case:
    """As for other kernels, as small as the interpreter needs them, with residuals."""
    case = draw(calls(CHANNELS, SIZES, least_batch=1))
    block, size = case.config, (case.height, case.width)
    if block.in_channels == block.out_channels and block.output_hw(*size) == size:
        case = replace(case, config=replace(block, residual=draw(st.booleans())))
    return case


@st.composite
def configurations(draw) -> PatchConfig:
    def one_of(*values):
        return draw(st.sampled_from(values))

    return replace(
        QUICK,
        patches=one_of(16, 32, 64),
        patch_h=one_of(1, 2, 3),
        patch_w=one_of(1, 2, 4),
        chunk=one_of(16, 32, 64),
        in_tile=one_of(16, 32),
        out_tile=one_of(8, 16, 32),
        out_tiles=one_of(1, 2),
        keep_x=draw(st.booleans()),
        half=draw(st.booleans()),
    )


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


# On a GPU, nearly each is a compilation of three seconds.
EXAMPLES = (1000 if LONG else 60) if HAS_GPU else 150 if LONG else 60


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    # The interpreter is too slow to look for a smaller failing call.
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(case=small_calls(), layout=layouts(), dtype=st.sampled_from(DTYPES), config=configurations())
def check_call(ran, case, layout, dtype, config):
    config = replace(config, half=config.half and dtype == torch.float16)
    # A call of a second says no more than one of a tenth.
    assume(steps(case, config) <= 700)
    x, weights = make_inputs(case, dtype)
    with DEVICE, default_dtype(dtype):
        x = layout(x)
    assert x.dtype == dtype
    y = run_config(x, weights, case, config)
    exact = weights.to(torch.float64)
    truth = reference.inverted_residual(x.double(), exact, **case.settings)
    allowed = TOLERANCE[dtype] * max(1.0, truth.abs().max().item() / 4)
    torch.testing.assert_close(
        y.double(), truth, rtol=0, atol=allowed, msg=lambda m: f"{case}, {config}: {m}"
    )
    ran[dtype] += 1


def test_random_calls():
    ran = Counter()
    check_call(ran)
    assert ran.total() >= EXAMPLES and min(ran[dtype] for dtype in DTYPES) >= EXAMPLES // 10, ran
