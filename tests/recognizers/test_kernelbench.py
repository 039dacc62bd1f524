"""KernelBench level 3, problems 20 (MobileNetV2) and 21 (an MBConv block), from their description.

Built as there: the blocks of problem 20 are bare `nn.Sequential`s, so that the network has no
residual connections; problem 21 has three named stages and a flag.
`python tests/recognizers/test_kernelbench.py [BATCH]` times both, plain against fused.
"""

import statistics
import sys
import time

import pytest
import torch
from foreign_blocks import (
    conv_norm_act,
    largest_difference,
)
from same_answers import randomise
from torch import Tensor, nn

import mnv2_kernels as mk
from mnv2_kernels.block.config import mobilenet_v2_block_inputs

pytestmark = pytest.mark.usefixtures("kernel_backend", "one_thread")


class MobileNetV2(nn.Module):
    """Problem 20: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        features = conv_norm_act(3, 32, 3, 2)
        for config, _ in mobilenet_v2_block_inputs(1.0, 224):
            hidden = config.hidden_channels
            expansion = conv_norm_act(config.in_channels, hidden) if config.expansion else []
            features.append(
                nn.Sequential(
                    *expansion,
                    *conv_norm_act(hidden, hidden, 3, config.stride, hidden),
                    *conv_norm_act(hidden, config.out_channels, act=None),
                )
            )
        features += [*conv_norm_act(320, 1280), nn.AdaptiveAvgPool2d((1, 1))]
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class MBConv(nn.Module):
    """Problem 21: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, expand_ratio):
        super().__init__()
        hidden = in_channels * expand_ratio
        self.use_residual = stride == 1 and in_channels == out_channels
        if expand_ratio != 1:
            self.expand_conv = nn.Sequential(*conv_norm_act(in_channels, hidden))
        self.depthwise_conv = nn.Sequential(
            *conv_norm_act(hidden, hidden, kernel_size, stride, hidden)
        )
        self.project_conv = nn.Sequential(*conv_norm_act(hidden, out_channels, act=None))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if hasattr(self, "expand_conv"):
            x = self.expand_conv(x)
        x = self.project_conv(self.depthwise_conv(x))
        return x + identity if self.use_residual else x


PROBLEMS = {
    "20": (MobileNetV2, (3, 224, 224), 17),
    "21": (lambda: MBConv(112, 192, kernel_size=5, stride=2, expand_ratio=6), (112, 224, 224), 1),
}


def build(problem: str) -> tuple[nn.Module, nn.Module, int]:
    """(plain, fused, blocks) with weights of no special values."""
    torch.manual_seed(0)
    constructor, _, blocks = PROBLEMS[problem]
    plain = randomise(constructor())
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return plain, mk.fuse(plain), blocks


@pytest.mark.parametrize("size", [56, 31])
@pytest.mark.parametrize("problem", PROBLEMS)
@torch.inference_mode()
def test_problem_is_fused_and_right(problem, size):
    plain, fused, blocks = build(problem)
    assert [row.state for row in mk.explain(fused)] == ["fused"] * blocks
    channels = PROBLEMS[problem][1][0]
    x = torch.rand(2, channels, size, size)
    clipped = hidden_values(plain, x)
    assert 0.05 < (clipped == 0).double().mean() < 0.95
    assert 0.001 < (clipped == 6).double().mean() < 0.5
    truth = plain.double()(x.double())
    plain.float()
    assert truth.std() > 0.01
    eager = largest_difference(plain(x), truth)
    assert largest_difference(fused(x), truth) <= 2 * eager + 1e-6 * truth.abs().max()


def hidden_values(model: nn.Module, x: Tensor) -> Tensor:
    """What comes out of every ReLU6."""
    values = []
    handles = [
        module.register_forward_hook(lambda m, args, y: values.append(y.flatten().clone()))
        for module in model.modules()
        if isinstance(module, nn.ReLU6)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return torch.cat(values)


def milliseconds(model: nn.Module, x: Tensor) -> float:
    begin = time.perf_counter()
    model(x)
    return 1e3 * (time.perf_counter() - begin)


def main(batch: int) -> None:
    """Medians of turns, plain and fused, at the sizes of the benchmark."""
    for problem, (_, shape, _) in PROBLEMS.items():
        plain, fused, _ = build(problem)
        x = torch.rand(batch, *shape)
        with torch.inference_mode():
            rounds = [(milliseconds(plain, x), milliseconds(fused, x)) for _ in range(12)][2:]
        eager, ours = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"problem {problem}, batch {batch}, {torch.get_num_threads()} threads:"
            f" eager {eager:.1f} ms, fused {ours:.1f} ms, {eager / ours:.2f}x"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
