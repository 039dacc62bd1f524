"""Training mode: exact batch statistics without the expanded tensor, beside float64 layers."""

from copy import deepcopy
from itertools import product

import cases
import pytest
import torch
from same_answers import randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import mnv2_kernels as mk
from mnv2_kernels.modules import training
from mnv2_kernels.ops.backends import ran
from mnv2_kernels.profiling.memory import live_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
]
# Of eager's error, and of the norm. One value that rounds across a clip's bound changes a gradient
# by up to 1e-2 of its norm; the driver (tests/cpu_alone) avoids such values, and is stricter.
TIMES_EAGER, FLOOR, FLOOR_OF_GRADIENTS = 2, 1e-5, 1e-2


class Block(nn.Module):
    """An inverted residual; `t` 1: no expansion."""

    def __init__(
        self, c_in, c_out, stride=1, t=6, kernel=3, dilation=1, clip=(0.0, 6.0), bias=False, **norm
    ):
        super().__init__()
        hidden = c_in * t
        pad = dilation * (kernel - 1) // 2
        layers = []
        if t > 1:
            layers += [nn.Conv2d(c_in, hidden, 1, bias=bias), nn.BatchNorm2d(hidden, **norm)]
            layers.append(nn.Hardtanh(*clip))
        depthwise = nn.Conv2d(
            hidden, hidden, kernel, stride, pad, dilation, groups=hidden, bias=bias
        )
        layers += [depthwise, nn.BatchNorm2d(hidden, **norm), nn.Hardtanh(*clip)]
        layers += [nn.Conv2d(hidden, c_out, 1, bias=bias), nn.BatchNorm2d(c_out, **norm)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.adds else y

    @property
    def norms(self):
        return [m for m in self.layers if isinstance(m, nn.BatchNorm2d)]


def made(*args, **kwargs) -> Block:
    """With random weights, in training mode; float64 weights are those of float32."""
    return randomise(Block(*args, **kwargs)).train()


def step(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, gradients of x and all parameters, and every buffer afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    (y * weights.cos().to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {f"grad {n}": p.grad for n, p in block.named_parameters()}
    return found | {n: b.clone() for n, b in block.named_buffers()}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    if not exact.is_floating_point():
        return float((found - exact).abs().max())
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-12))


def check(block: Block, x: torch.Tensor, times: float = TIMES_EAGER) -> None:
    fused = mk.fuse(deepcopy(block))
    assert fused.why_plain(x) is None
    exact = step(deepcopy(block).double(), x.double())
    before = ran()["cpu"]
    eager, ours = step(deepcopy(block), x), step(fused, x)
    assert ran()["cpu"] == before + 1
    # The convolution's bias is taken away again by the mean, so that its gradient is 0.
    biases = {f"grad layers.{i}.bias" for i, m in enumerate(block.layers) if is_conv(m)}
    assert ours.keys() == exact.keys()
    for name, of_name in exact.items():
        if name in biases and of_name.abs().max() < 1e-9:
            assert ours[name].abs().max() < 1e-3
            continue
        floor = FLOOR_OF_GRADIENTS if name == "x" or name.startswith("grad") else FLOOR
        allowed = times * error(eager[name], of_name) + floor
        assert error(ours[name], of_name) <= allowed, name


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def image(batch, channels, height, width, seed=3):
    return torch.randn(batch, channels, height, width, generator=torch.manual_seed(seed))


@pytest.mark.parametrize("size", [(7, 7), (5, 13), (1, 9), (28, 30)])
@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("stride,c_out", [(1, 24), (1, 12), (2, 40)])
@pytest.mark.parametrize("t,kernel,dilation", [(6, 3, 1), (6, 5, 1), (1, 3, 1), (3, 3, 2)])
def test_a_step_is_as_exact_as_that_of_the_layers(t, kernel, dilation, stride, c_out, batch, size):
    block = made(24, c_out, stride, t, kernel, dilation)
    check(block, image(batch, 24, *size))


@pytest.mark.parametrize("size,batch", [((61, 57), 3), ((30, 31), 40), ((112, 112), 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_batches_in_bands(stride, size, batch):
    """More than the cache holds of a chunk of channels: statistics come from a covariance."""
    check(made(16, 16, stride), image(batch, 16, *size))


@pytest.mark.parametrize(
    "how",
    [
        {"bias": True},
        {"affine": False},
        {"track_running_stats": True, "momentum": None},
        {"momentum": 1.0, "eps": 1e-3},
        {"clip": (0.0, float("inf"))},
        {"clip": (-0.3, 0.4)},
        {"clip": (-float("inf"), float("inf"))},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [6, 40])
def test_kinds_of_norms_and_clips(how, size):
    check(made(17, 17, **how), image(5, 17, size, size))


@pytest.mark.parametrize("live", [w for w in product((False, True), repeat=3) if any(w)])
@pytest.mark.parametrize("size", [6, 40])
def test_live_norms_beside_frozen_ones(live, size):
    block = made(8, 8)
    for norm, is_live in zip(block.norms, live, strict=True):
        norm.train(is_live)
    check(block, image(5, 8, size, size))


@pytest.mark.parametrize("size", [6, 50])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: 100 + x / 10,
        lambda x: torch.cat([torch.full_like(x[:, :4], 3.0), x[:, 4:]], 1),
        lambda x: x[:, :1].expand_as(x) + 1e-3 * x,
    ],
    ids=["large mean", "constant channels", "nearly the same channels"],
)
def test_unusual_statistics(change, size):
    check(made(8, 8), change(image(5, 8, size, size)), times=4)


@pytest.mark.parametrize("size", [(7, 7), (56, 30)])
def test_the_same_bits_at_any_number_of_threads(size, set_threads):
    block, x = made(24, 24), image(6, 24, *size)
    steps = []
    for threads in (1, 2, 3):
        set_threads(threads)
        steps.append(step(mk.fuse(deepcopy(block)), x))
    for other in steps[1:]:
        for name, found in steps[0].items():
            assert torch.equal(found, other[name]), name


@pytest.mark.parametrize("size", [14, 56])
def test_only_the_gradients_that_are_asked_for(size):
    x = image(4, 16, size, size)
    names = [n for n, _ in made(16, 16).named_parameters()]
    block = made(16, 16)
    whole = step(mk.fuse(deepcopy(block)), x)
    for wanted in [*names, "x"]:
        fused = mk.fuse(deepcopy(block))
        for name, parameter in fused.named_parameters():
            parameter.requires_grad_(name == wanted)
        own = x.clone().requires_grad_(wanted == "x")
        y = fused(own)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        (y * weights.cos().float()).sum().backward()
        if wanted == "x":
            assert torch.equal(own.grad, whole["x"])
        else:
            grads = {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}
            assert list(grads) == [wanted]
            assert torch.equal(grads[wanted], whole[f"grad {wanted}"])
    # Asked for afterwards.
    fused = mk.fuse(deepcopy(block))
    (found,) = torch.autograd.grad(fused(x).sum(), [fused.get_parameter(names[0])])
    assert found.shape == fused.get_parameter(names[0]).shape


def test_statistics_without_gradients():
    """As for recomputing batch norms: `torch.optim.swa_utils.update_bn`."""
    block, x = made(8, 8), image(4, 8, 9, 9)
    fused = mk.fuse(deepcopy(block))
    with torch.no_grad():
        assert torch.allclose(fused(x), block(x), atol=1e-5)
    for name, buffer in block.named_buffers():
        assert torch.allclose(fused.get_buffer(name), buffer, rtol=1e-5, atol=1e-6), name


def test_one_value_a_channel_raises_as_pytorch_does():
    block = made(8, 8)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(image(1, 8, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mk.fuse(block)(image(1, 8, 1, 1))
    strided = made(8, 8, stride=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mk.fuse(strided)(image(1, 8, 2, 2))


def test_second_derivatives_are_refused():
    fused, x = mk.fuse(made(8, 8)), image(2, 8, 5, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)


class OwnNorm(nn.BatchNorm2d):
    """A norm that computes something else while it trains."""

    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class DropsPaths(Block):
    """A block that leaves images out while it trains (stochastic depth)."""

    def forward(self, x):
        y = self.layers(x)
        return x + y * (torch.rand(len(x), 1, 1, 1) < 0.5) if self.training else x + y


def with_own_norm(block: Block) -> None:
    block.layers[4] = OwnNorm(block.layers[4].num_features).train()


def with_hook(block: Block) -> None:
    block.layers[4].register_forward_hook(lambda module, args, y: y + 1)


@pytest.mark.parametrize(
    "kind,change,reason",
    [
        (Block, with_own_norm, "training mode"),
        (Block, with_hook, "has hooks"),
        (DropsPaths, lambda block: None, ""),
    ],
)
def test_blocks_that_train_layer_by_layer(kind, change, reason):
    block, x = randomise(kind(8, 8)), image(3, 8, 6, 6)
    fused = mk.fuse(deepcopy(block))
    assert fused.why_plain(x) is None
    for module in (block, fused):
        change(module.train())
    assert reason in fused.why_plain(x)
    torch.manual_seed(1)
    expected = step(block, x)
    torch.manual_seed(1)
    found = step(fused, x)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train_layer_by_layer(dtype):
    block, x = made(8, 8).to(dtype), image(3, 8, 6, 6).to(dtype)
    expected, found = step(deepcopy(block), x), step(mk.fuse(block), x)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_autocast_trains_layer_by_layer():
    block, x = made(8, 8), image(3, 8, 6, 6)
    fused = mk.fuse(deepcopy(block))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), block(x))


def test_training_and_evaluating_by_turns():
    block, x = made(8, 8), image(3, 8, 9, 9)
    fused = mk.fuse(deepcopy(block))
    for _ in range(6):
        for module in (block, fused):
            module.train()
        assert torch.allclose(fused(x), block(x), atol=1e-5)
        assert fused.why_plain(x) is None
        for module in (block, fused):
            module.eval()
        with torch.no_grad():
            assert torch.allclose(fused(x), block(x), atol=1e-4)
        assert fused.why_plain(x) is None


def test_checkpointing_around_a_block():
    block, x = made(8, 8), image(3, 8, 9, 9)
    fused = mk.fuse(deepcopy(block))
    for module in (block, fused):
        inside = x.clone().requires_grad_()
        checkpoint(module, inside, use_reentrant=False).sum().backward()
    for name, parameter in block.named_parameters():
        ours = fused.get_parameter(name).grad
        assert torch.allclose(ours, parameter.grad, rtol=1e-2, atol=1e-4), name


@pytest.mark.parametrize("size,batch", [(56, 8), (14, 64)])
def test_nothing_of_the_expanded_size_is_allocated(size, batch):
    block = made(24, 24)
    x = image(batch, 24, size, size).to(memory_format=torch.channels_last).requires_grad_()
    fused = mk.fuse(block)
    fused(x).sum().backward()

    def forward_and_back():
        fused(x).sum().backward()

    assert max(live_bytes(forward_and_back)) < 144 * batch * size * size * 4


def test_a_network_learns_alike():
    """Losses of ten steps beside those of two eager networks that sum in another order."""
    torch.manual_seed(0)
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            *(Block(16, 16) for _ in range(3)),
            Block(16, 32, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )
    ).train()
    x, classes = image(16, 3, 32, 32), torch.arange(16) % 4
    losses = {}
    for name, network in {
        "eager": deepcopy(model),
        "channels_last": deepcopy(model).to(memory_format=torch.channels_last),
        "float64": deepcopy(model).double(),
        "fused": mk.fuse(deepcopy(model)),
    }.items():
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        own = x.to(next(network.parameters()).dtype)
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(own), classes)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses[name] = torch.tensor(found, dtype=torch.float64)
    apart = {n: float((v - losses["float64"]).abs().max()) for n, v in losses.items()}
    assert losses["float64"][-1] < losses["float64"][0] / 2
    assert apart["fused"] <= 3 * max(apart["eager"], apart["channels_last"]) + 1e-4


def with_biased_variance(norm, mean, var, count):
    MOVE(norm, mean, var * (count - 1) / count, count)


def with_momentum_swapped(norm, mean, var, count):
    momentum, norm.momentum = norm.momentum, 1 - norm.momentum
    MOVE(norm, mean, var, count)
    norm.momentum = momentum


def without_counting(norm, mean, var, count):
    MOVE(norm, mean, var, count)
    norm.num_batches_tracked.sub_(1)


MOVE = training.move_statistics


@pytest.mark.parametrize("fault", [with_biased_variance, with_momentum_swapped, without_counting])
def test_faults_of_running_statistics_are_found(fault, monkeypatch):
    """Those of the kernels are among the seeded faults (tests/sanitizers/test_seeded_bugs.py)."""
    block, x = made(8, 8), image(3, 8, 6, 6)
    check(block, x)
    monkeypatch.setattr(training, "move_statistics", fault)
    with pytest.raises(AssertionError):
        check(block, x)
