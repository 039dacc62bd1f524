"""Layers that follow one another in a Sequential run as one call.

What Sequentials share with whole networks: test_together.py.
"""

import copy
import io

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from whole_networks import NETWORKS, WHOLE, assert_same, expect, ready

import mnv2_kernels as mk
from mnv2_kernels.fuse.sequential import FusedSequential
from mnv2_kernels.ops.extension import missing

pytestmark = [
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def original() -> nn.Sequential:
    return ready(NETWORKS["torchvision"]()).features


@pytest.fixture
def model(original) -> nn.Sequential:
    return mk.fuse(original)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("size", [(64, 64), (65, 49)], ids=str)
@torch.no_grad()
def test_layers_that_cannot_be_fused_among_others(watch, size):
    """Activations that are no clips, with layers between them that run together."""
    original = ready(timm.create_model("tf_mobilenetv3_small_minimal_100"))
    x = torch.randn(3, 3, *size)
    assert_same(watch(mk.fuse(original), x), expect(original, x))
    assert watch.ran.together >= 1


@pytest.mark.parametrize("ends", [[], [nn.Flatten()], [nn.Flatten(), nn.Linear(8, 3)]], ids=len)
@torch.no_grad()
def test_an_average_keeps_its_dimensions(watch, x, ends):
    pool = nn.AdaptiveAvgPool2d(1)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6())
    original = ready(nn.Sequential(stem, mk.InvertedResidual(16, 8), pool, *ends))
    assert_same(watch(mk.fuse(original), x), expect(original, x))
    assert watch.ran.together == 1 and watch.ran.depthwise == 0


@torch.no_grad()
def test_hooks_of_a_container_inside(x):
    original = ready(NETWORKS["timm"]())
    model, seen = mk.fuse(original), []
    model.blocks[2].register_forward_hook(lambda *args: seen.append(args))
    assert_same(model(x), expect(original, x))
    assert len(seen) == 1


@torch.no_grad()
def test_one_layer_that_has_to_be_called(original, model, watch, x):
    """The others run together before and after it."""
    seen = []
    model[5].register_forward_hook(lambda *args: seen.append(args))
    assert_same(watch(model, x), expect(original, x))
    assert len(seen) == 1
    assert watch.ran.together == 2 and watch.ran.convolutions == 0 and watch.ran.blocks == 1


@torch.no_grad()
def test_children_replaced(original, model, x):
    model(x)
    other = ready(copy.deepcopy(original)[5], 16, 8, 8)
    changed = copy.deepcopy(original)
    model[5] = changed[5] = other
    assert_same(model(x), expect(changed, x))
    model[5] = mk.fuse(other)
    assert_same(model(x), expect(changed, x))
    del model[6], changed[6]
    assert_same(model(x), expect(changed, x))
    for part in (model, changed):
        part.append(nn.Mish())
    assert_same(model(x), expect(changed, x))


@torch.no_grad()
def test_slices_and_single_children(original, model, watch, x):
    assert_same(watch(model[:9], x), expect(original[:9], x))
    assert watch.ran == WHOLE
    assert_same(watch(lambda x: model[9:](model[:9](x)), x), expect(original, x))
    assert watch.ran == WHOLE._replace(together=2)
    y = x
    for child in model:
        y = child(y)
    assert_same(y, expect(original, x))
    assert not any(isinstance(m, FusedSequential) for m in mk.unfuse(model).modules())


@torch.no_grad()
def test_a_sequential_as_the_root_of_a_trace(original, x):
    root = mk.fuse(original[:4])
    assert isinstance(root, FusedSequential)
    assert_same(torch.fx.symbolic_trace(root)(x), expect(original[:4], x))


@torch.no_grad()
def test_a_stem_behind_a_block(watch):
    block = mk.InvertedResidual(3, 3)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    inside = nn.Sequential(block, stem, mk.InvertedResidual(8, 8), mk.InvertedResidual(8, 8))
    original = ready(nn.Sequential(inside, mk.InvertedResidual(8, 8)))
    x = torch.randn(2, 3, 40, 40)
    assert_same(watch(mk.fuse(original), x), expect(original, x))
    assert watch.ran.together >= 1 and watch.ran.depthwise == 0


def test_shared_containers_stay_shared(original):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Sequential(*original[2:5])

    fused = mk.fuse(Twice())
    assert fused.a is fused.b and isinstance(fused.a, FusedSequential)


def test_lazy_layers_are_left_alone():
    model = mk.fuse(nn.Sequential(nn.LazyConv2d(16, 1), mk.InvertedResidual(16, 16)).eval())
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 16, 8, 8)


@torch.no_grad()
def test_many_sizes(original, model, watch):
    """Programs of more sizes than are kept, in turns with changes of weights."""
    changed = copy.deepcopy(original)
    for size in (*range(32, 132, 2), 32):
        x = torch.randn(1, 3, size, 32)
        if size % 20 == 0:
            for part in (model, changed):
                next(part[3].parameters()).mul_(1.01)
        y = watch(model, x)
        assert watch.ran == WHOLE
        if size % 12 == 0:
            assert_same(y, expect(changed, x))


@torch.no_grad()
def test_a_saved_network(watch, x):
    model = mk.fuse(ready(torchvision.models.mobilenet_v2(width_mult=0.35)))
    file = io.BytesIO()
    torch.save(model.features, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(watch(again, x), model.features(x)) and watch.ran == WHOLE
