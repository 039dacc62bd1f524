"""torch.fx, make_fx, torch.jit and fake tensors: what is recorded of a fused block."""

import io

import pytest
import torch
from closeness import close
from same_answers import randomise
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.optimization import fuse as fuse_convolutions
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.modules.fused_module import FusedInvertedResidual

pytestmark = pytest.mark.usefixtures("kernel_backend", "one_thread")

OP = torch.ops.mnv2.inverted_residual.default


class Network(nn.Module):
    """A stem and two blocks, one of which is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.twice = TorchvisionBlock(8, 8, 1, 6)
        self.halving = TorchvisionBlock(8, 16, 2, 6)

    def forward(self, x):
        return self.halving(self.twice(self.twice(self.stem(x))))


@pytest.fixture
def networks():
    """(plain, fused) and an image."""
    plain = randomise(Network())
    return plain, mk.fuse(plain), torch.randn(2, 3, 18, 20)


@torch.no_grad()
def test_symbolic_trace_has_blocks_as_leaves(networks):
    plain, fused, x = networks
    for training in (False, True):
        graph = torch.fx.symbolic_trace(fused.train(training)).graph
        called = [n.target for n in graph.nodes if n.op == "call_module"]
        assert called == ["stem.0", "stem.1", "twice", "twice", "halving"]
        assert {n.op for n in graph.nodes} == {"placeholder", "call_module", "output"}
    traced = torch.fx.symbolic_trace(fused.eval())
    assert isinstance(traced.twice, FusedInvertedResidual)
    close(traced(x), plain(x))
    traced.twice.conv[2].weight.mul_(2)
    plain.twice.conv[2].weight.mul_(2)
    close(traced(x), plain(x))


@torch.no_grad()
def test_symbolic_trace_of_a_block_alone_is_its_layers(networks):
    plain, fused, _ = networks
    x = torch.randn(2, 8, 7, 7)
    for block in (fused.twice, mk.InvertedResidual(8, 8).eval()):
        traced = torch.fx.symbolic_trace(block)
        modules = dict(traced.named_modules())
        called = [modules[n.target] for n in traced.graph.nodes if n.op == "call_module"]
        assert sum(isinstance(module, nn.BatchNorm2d) for module in called) == 3
        close(traced(x), block(x))


@torch.no_grad()
def test_passes_over_the_graph_go_around_blocks(networks):
    """Folding of the stem's batch norm, and features taken out by name."""
    plain, fused, x = networks
    close(fuse_convolutions(fused)(x), plain(x))
    features = create_feature_extractor(fused, {"twice": "first", "halving": "last"})(x)
    close(features["first"], plain.twice(plain.stem(x)))
    close(features["last"], plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_graph_mode_quantisation_is_that_of_the_plain_model(networks):
    """Not half of it: the layers of the blocks are quantised as the others."""
    quantisation = pytest.importorskip("torch.ao.quantization")
    graph_mode = pytest.importorskip("torch.ao.quantization.quantize_fx")
    *models, x = networks
    results, targets = [], []
    for model in models:
        mapping = quantisation.get_default_qconfig_mapping("x86")
        prepared = graph_mode.prepare_fx(model, mapping, (x,))
        prepared(x)
        quantised = graph_mode.convert_fx(prepared)
        targets.append([str(n.target) for n in quantised.graph.nodes])
        results.append(quantised(x))
    assert targets[0] == targets[1] and "halving.conv.2" in targets[1]
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_make_fx_depends_on_the_parameters(networks, mode, cached):
    """Also where folded weights are cached: they are no constants of the graph."""
    plain, fused, x = networks
    if cached:
        fused(x)

    def call(state, x):
        return torch.func.functional_call(fused, state, (x,))

    state = dict(fused.state_dict())
    traced = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(state, x)
    assert [n.target for n in traced.graph.nodes].count(OP) == 3
    other = randomise(Network()).state_dict()
    expected = torch.func.functional_call(plain, other, (x,))
    assert (expected - plain(x)).abs().max() > 1e-2
    close(traced(other, x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_jit_trace_saves_the_op_and_follows_parameters(networks, grad, cached):
    plain, fused, x = networks
    with grad():
        if cached:
            fused(x)
        traced = torch.jit.trace(fused, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert str(loaded.inlined_graph).count("mnv2::inverted_residual") == 3
    state = randomise(Network()).state_dict()
    plain.load_state_dict(state)
    loaded.load_state_dict(state, strict=True)
    images = [torch.randn(3, 3, 18, 20, requires_grad=True) for _ in range(2)]
    images[1].data.copy_(images[0].data)
    for model, image in zip((plain, loaded), images, strict=True):
        model(image).square().sum().backward()
    close(images[1].grad, images[0].grad)
    with torch.no_grad():
        close(torch.jit.freeze(loaded.eval())(images[0]), plain(images[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [lambda: mk.mobilenet_v2(0.35), Network])
@torch.no_grad()
def test_jit_trace_warns_of_nothing(build):
    """Also of a whole network, which runs as one call where nothing is recorded."""
    plain = randomise(build())
    fused, x = mk.fuse(plain), torch.randn(2, 3, 34, 36)
    for _ in range(2):
        close(torch.jit.trace(fused, x)(x), plain(x))
        fused(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_is_refused_and_changes_nothing(networks):
    _, fused, x = networks
    for model in (fused, mk.InvertedResidual(8, 8)):
        before = list(model.modules())
        with pytest.raises(NotImplementedError, match="torch.jit.script: .*InvertedResidual"):
            torch.jit.script(model)
        assert list(model.modules()) == before


def test_fake_tensors_leave_no_trace(networks):
    plain, fused, x = networks
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for grad in (torch.no_grad, torch.enable_grad):
            with grad():
                assert fused(mode.from_tensor(x)).shape == (2, 16, 5, 5)
    with torch.no_grad():
        close(fused(x), plain(x))
    with FakeTensorMode():
        network = mk.mobilenet_v2(0.35).eval()
        for _ in range(2):
            assert network(torch.empty(3, 3, 64, 64)).shape == (3, 1000)
        with torch.no_grad():
            assert network(torch.empty(3, 3, 64, 64)).shape == (3, 1000)
