"""The block to build networks from, and MobileNetV2: plain layers to train, one pass to infer."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf
from numbers import Real

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..block.config import (
    LAST_CHANNELS,
    MOBILENET_V2_SETTINGS,
    NO_CLIP,
    RELU6,
    STEM_CHANNELS,
    BlockConfig,
    Padding,
    inverted_residual_config,
    make_divisible,
)
from ..block.fold import BlockLayers, ConvNorm
from ..ops.backends import check_backend
from ..ops.contract import whole
from ..recognizers import Declined, Reading, evaluation_mode, read
from .fused_module import FusedModule


class InvertedResidual(FusedModule):
    """The paper's block (MobileNetV2, section 3.3); children and state_dict keys as torchvision's.

    x (N, in_channels, H, W) -> (N, out_channels, H_out, W_out).

    Example:
        >>> block = mk.InvertedResidual(24, 32, stride=2, expand_ratio=6).eval()
        >>> block(torch.randn(1, 24, 56, 56)).shape
        torch.Size([1, 32, 28, 28])

    Args:
        in_channels, out_channels: channels of x and of the result.
        stride: of the depthwise, 1 or 2. The residual is added iff stride is 1 and the channel
            counts agree.
        expand_ratio: hidden channels over in_channels (the paper's t); 1 leaves expansion out.
        kernel_size: of the depthwise, 3 or 5.
        padding: (top, left, bottom, right) of the depthwise; None keeps the size at stride 1.
            TensorFlow's SAME at stride 2 on an even size is (0, 0, 1, 1) for kernel size 3.
        norm_layer: constructor of the batch norms.
        backend: a name from `backends()`; None takes the first that can run.

    Raises:
        TypeError, ValueError: an argument is none of these; the sentence names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expand_ratio: float = 6,
        kernel_size: int = 3,
        padding: Padding | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        backend: str | None = None,
    ):
        super().__init__()
        config = _checked_config(
            in_channels, out_channels, stride, expand_ratio, kernel_size, padding
        )
        check_backend("InvertedResidual", backend)
        in_channels, hidden = config.in_channels, config.hidden_channels
        stride, kernel_size, out_channels = config.stride, config.kernel_size, config.out_channels
        stages = [_conv_norm_clip(in_channels, hidden, norm_layer)] if config.expansion else []
        depthwise = PaddedConv2d(hidden, kernel_size, stride, config.padding)
        stages.append(nn.Sequential(depthwise, _norm(norm_layer, hidden), nn.ReLU6(inplace=True)))
        project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.conv = nn.Sequential(*stages, project, _norm(norm_layer, out_channels))
        self.stride = stride
        self.out_channels = out_channels
        self.use_res_connect = config.residual
        self.backend = backend
        clipped = [ConvNorm(stage[0], stage[1], RELU6) for stage in stages]
        layers = BlockLayers(
            expand=clipped[0] if config.expansion else None,
            depthwise=clipped[-1],
            project=ConvNorm(self.conv[-2], self.conv[-1], NO_CLIP),
            config=config,
        )
        self._take_over(Reading((layers,), is_sized=False))

    def plain_forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y

    def extra_repr(self) -> str:
        return f"{self.config.name}, residual={self.config.residual}"


def _checked_config(
    in_channels: int,
    out_channels: int,
    stride: int,
    expand_ratio: float,
    kernel_size: int,
    padding: Padding | None,
) -> BlockConfig:
    owner = "InvertedResidual"
    in_channels = whole(owner, "in_channels", in_channels, 1)
    out_channels = whole(owner, "out_channels", out_channels, 1)
    stride = whole(owner, "stride", stride)
    kernel_size = whole(owner, "kernel_size", kernel_size)
    for name, value, allowed in (("stride", stride, (1, 2)), ("kernel_size", kernel_size, (3, 5))):
        if value not in allowed:
            raise ValueError(f"{owner}: {name} must be in {allowed}, got {value!r}")
    _check_number(owner, "expand_ratio", expand_ratio)
    config = inverted_residual_config(in_channels, out_channels, stride, expand_ratio, kernel_size)
    if config.hidden_channels < 1:
        raise ValueError(
            f"{owner}: expand_ratio must give at least one hidden channel, got {expand_ratio!r} of"
            f" {in_channels}"
        )
    if padding is not None:
        if not isinstance(padding, Iterable) or isinstance(padding, str):
            raise TypeError(f"{owner}: padding must be 4 integers, got {padding!r}")
        padding = tuple(whole(owner, "padding", p) for p in padding)
        config = replace(config, padding=padding)
        _check_padding(config)
    return config


def _check_number(owner: str, name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not 0 < value < inf:
        raise ValueError(f"{owner}: {name} must be above 0 and finite, got {value!r}")


def _norm(norm_layer: Callable[[int], nn.Module], channels: int) -> nn.Module:
    """A batch norm that can be folded: what it computes in evaluation mode is known."""
    if not callable(norm_layer) or isinstance(norm_layer, nn.Module):
        raise TypeError(f"norm_layer must be a constructor, got {norm_layer!r}")
    norm = norm_layer(channels)
    odd = f"norm_layer must make batch norms of images, got {type(norm).__name__}"
    if not isinstance(norm, nn.Module) or not _has_statistics(norm):
        raise ValueError(odd)
    mean = norm.running_mean
    if mean is not None and mean.shape != (channels,):
        raise ValueError(f"norm_layer must make norms of {channels} channels, got {len(mean)}")
    if mean is not None and not _reads_as_norm(norm, channels):
        raise ValueError(odd)
    return norm


def _has_statistics(norm: nn.Module) -> bool:
    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm3d) or any(map(is_lazy, norm.buffers())):
        return False
    return all(hasattr(norm, name) for name in ("running_mean", "running_var", "eps"))


def _reads_as_norm(norm: nn.Module, channels: int) -> bool:
    """Whether its forward computes a batch norm, and perhaps a clip."""
    # On the meta device, where no random numbers are drawn.
    both = nn.Sequential(nn.Conv2d(channels, channels, 1, device="meta"), norm)
    try:
        with evaluation_mode(both):
            layers = read(both, (1, channels, 8, 8)).layers
    except Declined:
        return False
    return len(layers) == 1 and layers[0].stage.norm is norm


def _check_padding(config: BlockConfig) -> None:
    extent = config.kernel_size - 1
    padding = config.padding
    if len(padding) != 4 or not all(0 <= p <= extent for p in padding):
        raise ValueError(
            "InvertedResidual: padding must be 4 integers (top, left, bottom, right) from 0 to"
            f" {extent}, got {padding}"
        )
    top, left, bottom, right = padding
    if config.residual and (top + bottom, left + right) != (extent, extent):
        raise ValueError(
            "InvertedResidual: padding must keep the size of a block with a residual,"
            f" {extent} in both directions, got {padding}"
        )


class PaddedConv2d(nn.Conv2d):
    """A depthwise convolution whose four sides are padded with zeros independently."""

    def __init__(self, channels: int, kernel_size: int, stride: int, padding: Padding):
        top, left, bottom, right = padding
        symmetric = (top, left) == (bottom, right)
        super().__init__(
            channels,
            channels,
            kernel_size,
            stride,
            (top, left) if symmetric else 0,
            groups=channels,
            bias=False,
        )
        self.explicit_padding = None if symmetric else (left, right, top, bottom)

    def forward(self, x: Tensor) -> Tensor:
        if self.explicit_padding is not None:
            x = nn.functional.pad(x, self.explicit_padding)
        return super().forward(x)


def _conv_norm_clip(
    in_channels: int,
    out_channels: int,
    norm_layer: Callable[[int], nn.Module],
    *,
    kernel_size: int = 1,
    stride: int = 1,
    padding: int = 0,
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, _norm(norm_layer, out_channels), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """The network of the paper's Table 2, with fused blocks; state_dict keys are torchvision's.

    x (N, 3, H, W) -> logits (N, num_classes). Build it with `mobilenet_v2`.
    """

    def __init__(
        self,
        width_mult: float,
        num_classes: int,
        *,
        dropout: float,
        tf_padding: bool,
        norm_layer: Callable[[int], nn.Module],
    ):
        super().__init__()
        channels = make_divisible(STEM_CHANNELS * width_mult)
        stem = _conv_norm_clip(
            3, channels, norm_layer, kernel_size=3, stride=2, padding=0 if tf_padding else 1
        )
        if tf_padding:
            stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), *stem)
        features: list[nn.Module] = [stem]
        halving_padding = (0, 0, 1, 1) if tf_padding else None
        for expand_ratio, base_channels, repeats, first_stride in MOBILENET_V2_SETTINGS:
            out_channels = make_divisible(base_channels * width_mult)
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                block = InvertedResidual(
                    channels,
                    out_channels,
                    stride=stride,
                    expand_ratio=expand_ratio,
                    padding=halving_padding if stride == 2 else None,
                    norm_layer=norm_layer,
                )
                features.append(block)
                channels = out_channels
        # Only widths above 1 widen the last convolution (paper, section 4.1).
        self.last_channel = make_divisible(LAST_CHANNELS * max(1.0, width_mult))
        features.append(_conv_norm_clip(channels, self.last_channel, norm_layer))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes)
        )
        _initialise(self.modules())

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.mean((2, 3)))


def _initialise(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def mobilenet_v2(
    width_mult: float = 1.0,
    num_classes: int = 1000,
    *,
    dropout: float = 0.2,
    tf_padding: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> MobileNetV2:
    """MobileNetV2 of the paper (arXiv 1801.04381, Table 2), any width multiplier and resolution.

    Example:
        >>> model = mk.mobilenet_v2(width_mult=0.5, num_classes=10).eval()
        >>> model(torch.randn(2, 3, 96, 96)).shape
        torch.Size([2, 10])

    Args:
        width_mult: the paper uses 0.35, 0.5, 0.75, 1.0 and 1.4; above 0.
        num_classes: length of the logits.
        dropout: probability before the classifier while training.
        tf_padding: pad as TensorFlow and Keras do at stride 2, after the last row and column
            only, for weights trained there (sizes that stay even; those use an eps of 1e-3 too).
            The stem's state_dict keys are then one further: `features.0.1.weight`.
        norm_layer: constructor of the batch norms.

    Raises:
        TypeError, ValueError: width_mult is no positive number, num_classes no positive integer,
            or norm_layer makes something else.
    """
    _check_number("mobilenet_v2", "width_mult", width_mult)
    num_classes = whole("mobilenet_v2", "num_classes", num_classes, 1)
    return MobileNetV2(
        width_mult, num_classes, dropout=dropout, tf_padding=tf_padding, norm_layer=norm_layer
    )
