"""Calls of the CUDA op, and which of its kernels takes a block."""

from dataclasses import replace
from functools import cache
from importlib import import_module

import cases
import cuda_cases
import pytest
import torch
from cases import Case, make_inputs
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import BlockConfig
from mnv2_kernels.ops.extension import module as _C

# The package has a function of that name.
backends = import_module("mnv2_kernels.ops.backends")


compiles = pytest.mark.skipif(_C is None, reason="needs the compiled extension")


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


PATCH = Case(BlockConfig(16, 48, 16, residual=True), 21, 23, batch=2)


TILE = Case(BlockConfig(40, 80, 48, stride=2), 9, 10, batch=2)


GENERIC = Case(BlockConfig(5, 19, 7, padding=(0, 2, 1, 1)), 6, 5, batch=2)


def arguments(x: Tensor, weights: FoldedWeights, case: Case) -> tuple:
    return x, *weights.tensors(), *case.settings.values(), *weights.clips()


def inputs(case: Case, dtype: torch.dtype = torch.float16) -> tuple[Tensor, FoldedWeights]:
    """x and weights in dtype, biases in float32."""
    x, weights = make_inputs(case)
    names = ("b_expand", "b_dw", "b_project")
    biases = {name: getattr(weights, name) for name in names}
    return x.to(dtype), replace(weights.to(dtype), **biases)


def odd_view(tensor: Tensor) -> Tensor:
    """The same numbers one element after an address that is a multiple of 16."""
    storage = tensor.new_empty(tensor.numel() + 1)[1:]
    view = storage.as_strided(tensor.shape, tensor.stride())
    assert view.data_ptr() % 16 == tensor.element_size()
    return view.copy_(tensor)


def kernel_of(case: Case, dtype: torch.dtype) -> str:
    return backends.cuda_kernel(
        torch.empty((), dtype=dtype).expand(1, case.config.in_channels, case.height, case.width),
        backends.Block.of(case.config, case.clips),
    )


@cache
def blocks_of(kernel: str, dtype: torch.dtype) -> list[Case]:
    """Every case of the tests that this kernel is chosen for."""
    groups = [*cases.groups().values(), cuda_cases.large_images(), cuda_cases.whole_octets()]
    return [case for group in groups for case in group if kernel_of(case, dtype) == kernel]
