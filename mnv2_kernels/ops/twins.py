"""An op as the Triton kernels compute it: its twin, into which torch.compile can look."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.library import CustomOpDef

from .contract import check_once
from .registration import Op, register_fake, register_forward


def register_twin(
    library: torch.library.Library, op: Op, schema: str, kernel: Callable[..., Tensor]
) -> CustomOpDef:
    """`mnv2::{name}_triton`, which launches `kernel` on CUDA tensors, and what it runs on CPU
    tensors, `mnv2::{name}_interpreted`, where tracing stops.
    """
    interpreted = f"{op.name}_interpreted"
    library.define(f"{interpreted}{schema}", tags=[torch.Tag.pt2_compliant_tag])
    library.impl(interpreted, kernel, "CPU")
    register_fake(library, op, interpreted)

    def launch(*arguments: Any) -> Tensor:
        check_once(op.check, op.tensors, *arguments)
        if arguments[0].is_cuda:
            return kernel(*arguments)
        return getattr(torch.ops.mnv2, interpreted)(*arguments)

    name = f"{op.name}_triton"
    twin = torch.library.custom_op(f"mnv2::{name}", launch, mutates_args=(), schema=schema)

    @twin.register_torch_dispatch(FunctionalTensorMode)
    def look_inside(mode, overload, types, args, kwargs):
        """The launch in place of the op, for a compiler that traces it.

        As in `torch.library.triton_op`, which imports Triton and the compiler when it registers an
        op.
        """
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        if not all(issubclass(t, FakeTensor) or t in (Tensor, FunctionalTensor) for t in types):
            return NotImplemented
        with mode:
            return launch(*args, **kwargs)

    register_forward(library, op, name)
    return twin
