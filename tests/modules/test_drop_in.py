"""A fused block where other code expects the original: attributes, hooks, changed layers."""

import copy

import pytest
import torch
from efficientnet_lite_pytorch.model import MBConvBlock
from foreign_blocks import (
    largest_difference,
    lukemelas,
    mobilenet_v1_pair,
)
from fused_pairs import assert_same, image
from same_answers import randomise
from timm.models._efficientnet_blocks import InvertedResidual as TimmBlock
from torch import nn
from torchvision.models.mnasnet import _InvertedResidual as MnasnetBlock
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")


def test_attributes_of_the_original_stay():
    block = mk.fuse(TorchvisionBlock(8, 16, 2, 6))
    assert (block.stride, block.out_channels, block._is_cn) == (2, 16, True)
    assert block.use_res_connect is False
    assert isinstance(block.conv[0][0], nn.Conv2d)
    block = mk.fuse(TimmBlock(8, 8, exp_ratio=3.0, act_layer=nn.ReLU6))
    assert block.has_skip is True
    assert block.feature_info("bottleneck") == {"module": "", "num_chs": 8}
    block = mk.fuse(lukemelas())
    assert block.id_skip is True
    assert block._block_args.input_filters == 8
    with pytest.raises(AttributeError, match="no_such_name"):
        block.no_such_name  # noqa: B018


def test_a_child_may_have_any_name():
    """mnasnet's body is `layers`; it must not be hidden."""
    block = MnasnetBlock(8, 8, 3, 1, 3)
    fused = mk.fuse(block, inplace=True)
    assert fused.layers is block.layers
    assert len(fused.layers) == 8


def test_further_arguments_reach_the_original():
    """drop_connect_rate does nothing in evaluation mode and something in training."""
    block: MBConvBlock = randomise(lukemelas())
    fused = mk.fuse(block, backend="reference", inplace=True)
    x = torch.randn(64, 8, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, 0.5), fused(x))
        torch.testing.assert_close(fused(x, drop_connect_rate=0.5), fused(x))
        fused.train()
        dropped = (fused(x, drop_connect_rate=0.5) == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 64


@pytest.mark.parametrize("training", [False, True])
def test_hooks_of_the_block_are_called_once(pair, training):
    block, _ = pair
    block = copy.deepcopy(block)
    vars(block).pop("forward", None)
    calls = []
    handle = block.register_forward_hook(lambda m, args, y: calls.append(y))
    fused = mk.fuse(block, backend="reference", inplace=True).train(training)
    y = fused(image())
    assert len(calls) == 1
    assert calls[0] is y
    handle.remove()
    fused(image())
    assert len(calls) == 1


def test_hook_on_an_inner_module_is_called(pair):
    """Of a fused block too: it runs plain from then on, and fused again afterwards."""
    block, fused = pair
    calls = []
    inner = [m for m in fused.modules() if isinstance(m, nn.Conv2d)][1]
    handle = inner.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        fused(image())
        assert len(calls) == 1
        assert "hooks" in fused.why_plain(image())
        handle.remove()
        assert_same(block, fused)


def assert_replica_runs_its_own_children(block, fused, x):
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(fused(x), other(x))
        # As torch.nn.parallel.replicate does for each further device.
        replica = fused._replicate_for_data_parallel()
        for name, child in other.named_children():
            replica._modules[name] = child
        assert torch.equal(replica(x), other(x))
        assert largest_difference(fused(x), block(x)) < 1e-11


def test_replica_for_data_parallel_runs_its_own_children(pair):
    block, fused = pair
    vars(block).pop("forward", None)
    plain = copy.deepcopy(block)
    plain.forward = getattr(plain, "plain_forward", plain.forward)
    assert_replica_runs_its_own_children(plain, fused, image())


def test_replica_of_a_chain_runs_its_own_children():
    chain = nn.Sequential(nn.Tanh(), *mobilenet_v1_pair(nn.ReLU6)).eval().double()
    fused = mk.fuse(chain, backend="reference")
    assert_replica_runs_its_own_children(chain, fused, image())


def test_replaced_layer_is_computed():
    block = randomise(TorchvisionBlock(8, 8, 1, 6)).double()
    fused = mk.fuse(block, backend="reference")
    for module in (block, fused):
        module.conv[0][2] = nn.Mish()
    x = image()
    with torch.no_grad():
        assert torch.equal(fused(x), block(x))
    assert "mish is not supported" in fused.why_plain(x)


def test_synchronised_norm_after_fusing_trains_its_statistics():
    block = randomise(TorchvisionBlock(8, 8, 1, 6)).double()
    fused = mk.fuse(nn.Sequential(block), backend="reference")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused).eval()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.mul_(1.5)
        x = image()
        assert largest_difference(converted(x), mk.unfuse(converted)(x)) < 1e-11


def test_dropping_in_training_alone():
    block = randomise(TimmBlock(8, 8, exp_ratio=3.0, act_layer=nn.ReLU6, drop_path_rate=0.5))
    fused = mk.fuse(block.double(), backend="reference")
    x = image()
    assert fused.why_plain(x) is None
    with torch.no_grad():
        assert_same(block, fused, x)
        for module in (block, fused):
            module.drop_path.train()
            torch.manual_seed(3)
        assert "in drop_path (DropPath)" in fused.why_plain(x)
        results = []
        for module in (block, fused):
            torch.manual_seed(3)
            results.append(module(x))
        assert torch.equal(*results)
        assert not torch.equal(results[0], block.eval()(x))


def test_dilated_after_fusing():
    """segmentation code dilates the last stages of a backbone in place."""
    block = randomise(TorchvisionBlock(8, 8, 1, 6)).double()
    fused = mk.fuse(block, backend="reference")
    with torch.no_grad():
        fused(image())
        for module in (block, fused):
            module.conv[1][0].dilation = module.conv[1][0].padding = (2, 2)
        x = image()
        assert_same(block, fused, x)
        assert_same(block, mk.fuse(mk.unfuse(fused), backend="reference"), x)
