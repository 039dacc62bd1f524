"""Plans of networks with squeeze-excite and curves: their values, and that the networks say enough.

The same bits everywhere: test_gated_plan_bits.py.
"""

from copy import deepcopy

import cases
import pytest
import torch
from cases import why_wrong
from gated_networks import (
    NETWORKS,
    expect,
    gate_convolutions,
    judged,
    network,
    three_layers_at_the_end,
)
from plan_cases import image
from torch import Tensor, nn
from whole_networks import WHOLE

import mnv2_kernels as mk
from mnv2_kernels.network.plan import Plan
from mnv2_kernels.network.program import Block, Linear, Stem
from mnv2_kernels.profiling.variants import plain

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

networks = pytest.mark.parametrize("name", NETWORKS)
# Some of them with sizes of no use to anybody.
CALLS = [
    *[(name, size) for name in NETWORKS for size in ((96, 96), (97, 130))],
    ("mobilenet_v3_small", (224, 224)),
    ("mobilenet_v3_small", (33, 31)),
    ("lcnet_050", (1, 1)),
    ("mnasnet_small", (224, 40)),
]


def has_gate(plan: Plan, number: int) -> bool:
    layer = plan.steps[number].layer
    return isinstance(layer, Block) and layer.weights.gate is not None


@torch.no_grad()
def gates(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the last layer of every squeeze-excite gives, (N, channels)."""
    found = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: found.append(y[:, :, 0, 0]))
        for m in model.modules()
        if isinstance(m, nn.Sigmoid | nn.Hardsigmoid)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_what_the_networks_cover():
    """Gates that act; a stem that streams into one; several fully connected layers at the end."""
    stems = 0
    for name in NETWORKS:
        model, x = network(name), image(4, 3, 96, 96)
        plan = mk.plan(model, x.shape)
        count = sum(has_gate(plan, i) for i in range(len(plan.steps)))
        assert count >= 1 and len(gate_convolutions(model, x)) >= 2 * count, name
        for gate in gates(model, x):
            assert gate.min() < 0.3 and gate.max() > 0.7 and gate.std(0).max() > 1e-2, name
        first = plan.steps[0]
        stems += isinstance(first.layer, Stem) and first.streams and has_gate(plan, 1)
    assert stems >= 2
    v3 = mk.plan(network("mobilenet_v3_large"), (3, 96, 96))
    assert [type(step.layer) for step in v3.steps[-2:]] == [Linear, Linear]
    assert v3.steps[-2].layer.clip == "hardswish"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "size"), CALLS, ids=str)
@torch.no_grad()
def test_answers(name, size, watch):
    model, x = network(name), image(3, 3, *size)
    expected = expect(model, x)
    plan, fused = mk.plan(model, x.shape), mk.fuse(model)
    y = plan(x)
    assert (reason := why_wrong(y, expected)) is None, reason
    fused(x)
    together = watch(fused, x)
    assert watch.ran == WHOLE, watch.ran
    assert (reason := why_wrong(together, expected)) is None, reason
    assert torch.equal(mk.plan(fused, x.shape[1:])(x), y)


WRONG = {
    "gate of another image": lambda y: y.roll(1, 0),
    "gate of the next channel": lambda y: y.roll(1, 1),
    "no gate": torch.ones_like,
    "sigmoid for hardsigmoid": lambda y: torch.sigmoid(6 * y - 3),
    "a gate off by a thousandth": lambda y: 1.001 * y,
}


@networks
@torch.no_grad()
def test_wrong_gates_are_found(name):
    """By the comparison above, each in the last squeeze-excite alone."""
    model, x = deepcopy(network(name)), image(3, 3, 96, 96)
    expected = expect(model, x)
    last = [m for m in model.modules() if isinstance(m, nn.Sigmoid | nn.Hardsigmoid)][-1]
    for wrong, change in WRONG.items():
        hook = last.register_forward_hook(lambda m, x, y, change=change: change(y))
        assert why_wrong(model(x), expected) is not None, wrong
        hook.remove()
    assert why_wrong(model(x), expected) is None


@networks
@torch.no_grad()
def test_plans_in_bfloat16(name):
    """Of the weights before they are rounded, against what PyTorch makes of the rounded ones."""
    model, x = network(name), image(8, 3, 97, 130).to(torch.bfloat16)
    y = mk.plan(model, x.shape, dtype=torch.bfloat16)(x)
    assert (reason := why_wrong(y, expect(model, x))) is None, reason


@networks
@torch.no_grad()
def test_weights_are_copies(name):
    """All of the gates' too: a plan keeps to what the model was."""
    model, x = deepcopy(network(name)), image(2, 3, 64, 64)
    plan = mk.plan(model, x.shape)
    right = plan(x)
    for parameter in model.parameters():
        parameter.mul_(2)
    assert torch.equal(plan(x), right)


@torch.no_grad()
def test_a_tail_of_three_layers():
    """Fully connected layers of other sizes and curves."""
    model = three_layers_at_the_end()
    for dtype in cases.DTYPES:
        x = image(9, 3, 7, 5).to(dtype)
        plan = mk.plan(model, x.shape, dtype=dtype)
        assert sum(isinstance(step.layer, Linear) for step in plan.steps) == 3
        truth = plain(model).double()(x.double())
        expected = judged(truth, [plain(model).to(dtype)(x)], dtype)
        assert (reason := why_wrong(plan(x), expected)) is None, reason
