"""This package: the model as a plan, and after `fuse`."""

import torch
from torch import Tensor, nn

from mnv2_kernels import fuse, mobilenet_v2, plan
from mnv2_kernels.profiling.verify import kernels

from .peer import Loaded, Peer, of_module


def load_plan(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    return of_module(plan(model, x.shape), x)


def load_plan_bf16(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    return of_module(plan(model, x.shape, dtype=torch.bfloat16), x.bfloat16())


def load_fused(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    return of_module(fuse(model).to(memory_format=torch.channels_last), x)


def load_fused_bf16(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    fused = fuse(model.bfloat16()).to(memory_format=torch.channels_last)
    return of_module(fused, x.bfloat16())


def why_no_kernel(dtype: torch.dtype = torch.float32) -> str | None:
    running, reasons = kernels("cpu", dtype)
    return None if running else "; ".join(reasons)


def why_no_bf16_kernel() -> str | None:
    return why_no_kernel(torch.bfloat16)


def why_no_bf16_plan() -> str | None:
    if reason := why_no_kernel():
        return reason
    try:
        plan(mobilenet_v2(0.35).eval(), (3, 32, 32), dtype=torch.bfloat16)
    except TypeError as error:
        return str(error)
    return None


PEERS = (
    Peer("planned", load_plan, needs=why_no_kernel, as_written=True),
    Peer("fused", load_fused, needs=why_no_kernel, as_written=True),
    Peer(
        "planned-bf16",
        load_plan_bf16,
        precision="bfloat16",
        needs=why_no_bf16_plan,
        as_written=True,
    ),
    Peer(
        "fused-bf16",
        load_fused_bf16,
        precision="bfloat16",
        needs=why_no_bf16_kernel,
        as_written=True,
    ),
)
