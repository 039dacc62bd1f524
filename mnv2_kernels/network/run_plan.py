"""`torch.ops.mnv2.run_plan` and `run_plan_in`: a network of fixed size as one op on the CPU.

x (N, C, H, W) float32, bfloat16 or float16; weights, program and bounds come from
`program.Program`. The result is the last step's, (N, ...). `run_plan` allocates what it needs
in between. `run_plan_in` has it in `arena`, contiguous uint8 that begins at a multiple of 64 bytes,
and runs on as many threads as that has room for; calls at the same time need one arena each.
"""

import torch

from ..ops.extension import missing

_library = torch.library.Library("mnv2", "FRAGMENT")
_BEHIND_X = "Tensor?[] weights, int[] program, float[] bounds) -> Tensor"
for _schema in (
    f"run_plan(Tensor x, {_BEHIND_X}",
    f"run_plan_in(Tensor x, Tensor(a!) arena, {_BEHIND_X}",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])


@torch.library.register_fake("mnv2::run_plan", lib=_library)
def _fake(x, weights, integers, bounds):
    torch._check_value(x.dim() == 4, lambda: f"run_plan: x must have 4 dimensions, got {x.dim()}")
    _check_devices(x, {f"weights[{i}]": w for i, w in enumerate(weights) if w is not None})
    dims = integers[3]
    y = x.new_empty((x.shape[0], *integers[4 : 4 + dims]))
    return y.to(memory_format=torch.channels_last) if dims == 3 else y


@torch.library.register_fake("mnv2::run_plan_in", lib=_library)
def _fake_in(x, arena, weights, integers, bounds):
    _check_devices(x, {"arena": arena})
    return _fake(x, weights, integers, bounds)


def _check_devices(x, others):
    """One tensor on the meta device is enough for PyTorch to ask for a fake result."""
    for name, tensor in others.items():
        torch._check_value(
            tensor.device == x.device,
            lambda n=name, t=tensor: (
                f"run_plan: {n} must be on the device of x, {x.device}, got {t.device}"
            ),
        )


if missing is not None:

    def _unavailable(*args):
        raise RuntimeError(f"run_plan: {missing}")

    _library.impl("run_plan", _unavailable, "CPU")
    _library.impl("run_plan_in", _unavailable, "CPU")

run_plan = torch.ops.mnv2.run_plan.default
run_plan_in = torch.ops.mnv2.run_plan_in.default
