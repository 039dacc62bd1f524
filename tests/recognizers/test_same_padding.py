"""Blocks that pad by the size of their input, as TensorFlow's SAME does at stride 2."""

import copy
import pickle

import pytest
import torch
from foreign_blocks import (
    conv_norm_act,
    lukemelas,
    old_timm_same,
    smp_block,
    transformers_block,
)
from same_answers import randomise
from timm.layers import Conv2dSame
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = {
    "timm": lambda: old_timm_same(2, out_channels=16),
    "timm-k5": lambda: old_timm_same(2, 5, out_channels=16),
    "transformers": lambda: transformers_block(16, 2),
    "lukemelas": lambda: lukemelas(8, 16, 3, 2, 5, None),
    "smp": lambda: smp_block(stride=2, act=nn.ReLU6),
}
# Every parity of height and width, and images smaller than the kernel.
SIZES = ((8, 10), (8, 11), (9, 10), (9, 11), (1, 1), (1, 2), (2, 1), (3, 4))


@pytest.fixture(params=BLOCKS)
def block(request):
    return randomise(BLOCKS[request.param]()).double()


def image(height, width, dtype=torch.float64):
    return 4 * torch.randn(2, 8, height, width, dtype=dtype)


def assert_same(fused, block, sizes=SIZES):
    for size in sizes:
        x = image(*size)
        with torch.no_grad():
            y, z = fused(x), block(x)
        torch.testing.assert_close(y, z, rtol=0, atol=1e-12 * z.abs().max().item())


def padding(kernel, size):
    """(before, after) by TensorFlow's definition: ceil(size / 2) results, an odd zero last."""
    total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
    return total // 2, total - total // 2


def test_each_parity_of_the_size(block):
    fused = mk.fuse(block, backend="reference")
    before = ran().get("reference", 0)
    assert_same(fused, block)
    assert ran()["reference"] == before + len(SIZES)
    (row,) = mk.explain(fused)
    found = []
    for height, width in SIZES:
        (row,) = mk.explain(fused, input_shape=(1, 8, height, width))
        top, left, bottom, right = row.config.padding
        assert (top, bottom) == padding(row.config.kernel_size, height)
        assert (left, right) == padding(row.config.kernel_size, width)
        found.append(row.config.padding)
    assert len(set(found)) >= 4


def test_original_and_copies(block):
    fused = mk.fuse(block, backend="reference")
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.fill_(1)
        assert_same(again, block)
        fused = again
    assert type(mk.unfuse(fused)) is type(block)
    assert list(fused.state_dict()) == list(block.state_dict())


def test_new_weights_are_seen(block):
    fused = mk.fuse(block, backend="reference")
    assert_same(fused, block)
    for module in (fused, block):
        for parameter in module.parameters():
            parameter.data.mul_(0.7)
        module.train().eval()
    assert_same(fused, block)
    assert_same(fused.float().double(), block.float().double())


def test_training(block):
    plain = block.float()
    fused = mk.fuse(plain).train()
    x = image(9, 10).float()
    assert fused.why_plain(x) is None
    torch.testing.assert_close(fused(x), plain.train()(x), rtol=1e-4, atol=1e-4)


def test_gradients(block):
    fused = mk.fuse(block, backend="reference")
    for size in SIZES[:4]:
        x = image(*size).requires_grad_()
        y = image(*size)
        for module in (block, fused):
            module.zero_grad()
        (grad,) = torch.autograd.grad(block(x).square().sum(), x)
        (fused_grad,) = torch.autograd.grad(fused(x).square().sum(), x)
        torch.testing.assert_close(fused_grad, grad, rtol=1e-9, atol=1e-9)
        for module in (block, fused):
            module(y).square().sum().backward()
        for (name, p), q in zip(block.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_verify_and_backend():
    block = randomise(BLOCKS["timm"]())
    fused = mk.fuse(block, verify=True)
    (row,) = mk.explain(fused)
    assert row.state == "fused"
    mk.fuse(fused, backend="reference", inplace=True)
    (row,) = mk.explain(fused)
    assert row.backend == "reference"


def test_explain_counts_by_the_size():
    fused = mk.fuse(randomise(BLOCKS["timm"]()))
    # 24 channels are expanded; the depthwise gives ceil(size / 2).
    for height, width in ((8, 10), (9, 11)):
        (row,) = mk.explain(fused, input_shape=(1, 8, height, width))
        halved = -(-height // 2) * -(-width // 2)
        assert row.bytes_saved == 4 * 24 * (height * width + halved)


def test_in_a_chain():
    layers = [
        nn.Tanh(),
        Conv2dSame(8, 8, 3, stride=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        *conv_norm_act(8, 16),
    ]
    model = randomise(nn.Sequential(*layers)).double()
    fused = mk.fuse(model, backend="reference")
    assert [row.name for row in mk.explain(fused)] == ["[1:7]"]
    assert_same(fused, model)
    assert_same(fused[1:], nn.Sequential(*layers[1:]).eval())


def chain():
    return nn.Sequential(nn.Tanh(), *conv_norm_act(8, 8, 3, 1, 8), *conv_norm_act(8, 16))


@pytest.mark.parametrize("build", [BLOCKS["timm"], chain], ids=["by size", "chain"])
def test_compiled_in_one_graph_and_exported(build):
    block = randomise(build())
    fused = mk.fuse(block)
    compiled = torch.compile(fused, fullgraph=True, dynamic=False, backend="aot_eager")
    for size in ((8, 10), (9, 10)):
        x = image(*size, dtype=torch.float32)
        with torch.no_grad():
            expected = block(x)
            program = torch.export.export(fused, (x,))
            # In a graph, layers apply a padding that depends on the size.
            has_op = any("mnv2" in str(node.target) for node in program.graph.nodes)
            assert has_op == (build is chain)
            for y in (compiled(x), program.module()(x)):
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [BLOCKS["timm"], chain], ids=["by size", "chain"])
def test_traced_symbolically(build):
    block = randomise(build()).double()
    model = nn.Sequential(mk.fuse(block, backend="reference"), nn.Tanh())
    assert_same(torch.fx.symbolic_trace(model), nn.Sequential(block, nn.Tanh()), SIZES[:4])
