"""Models of other libraries by name, small enough to run many of them; weights are random."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
import transformers
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block
from torchvision.models.segmentation import deeplabv3, lraspp


@dataclass(frozen=True)
class Model:
    """How to build a model, and the height and width of its test images."""

    build: Callable[[], nn.Module]
    size: tuple[int, int] = (64, 64)


class Heads(nn.Module):
    """A detector's backbone and heads: everything but the selection of boxes."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


class Mobilenet2Pyramid(nn.Module):
    """MobileNetV2 as SSDLite's backbone: two levels of its own, four more above them."""

    def __init__(self):
        super().__init__()
        features = mobilenet_v2(width_mult=0.5).features
        # As in torchvision's SSDLite, the first level is the expansion inside block 14.
        self.low = nn.Sequential(*features[:14], features[14].conv[0])
        self.high = nn.Sequential(features[14].conv[1:], *features[15:])
        channels = (1280, 512, 256, 256, 128)
        self.extra = nn.ModuleList(
            _extra_block(a, b, nn.BatchNorm2d) for a, b in zip(channels, channels[1:], strict=False)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [self.low(x)]
        levels.append(self.high(levels[0]))
        for block in self.extra:
            levels.append(block(levels[-1]))
        return {str(i): level for i, level in enumerate(levels)}


def ssdlite_mobilenet_v2() -> nn.Module:
    anchors = DefaultBoxGenerator([[2, 3]] * 6)
    head = SSDLiteHead(
        [288, 1280, 512, 256, 256, 128], anchors.num_anchors_per_location(), 5, nn.BatchNorm2d
    )
    return Heads(SSD(Mobilenet2Pyramid(), anchors, (320, 320), 5, head=head))


def ssdlite_mobilenet_v3() -> nn.Module:
    return Heads(
        torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5
        )
    )


def dilated_mobilenet_v2(width_mult: float = 0.5) -> nn.Module:
    """Its features at output stride 16: the last stage dilated instead of strided."""
    features = mobilenet_v2(width_mult=width_mult).features
    features[14].conv[1][0].stride = (1, 1)
    for block in features[15:18]:
        block.conv[1][0].dilation = block.conv[1][0].padding = (2, 2)
    return features


def deeplab_mobilenet_v2() -> nn.Module:
    backbone = IntermediateLayerGetter(dilated_mobilenet_v2(), {"18": "out"})
    return deeplabv3.DeepLabV3(backbone, deeplabv3.DeepLabHead(1280, 5, (2, 4, 6)), None)


def lraspp_mobilenet_v2() -> nn.Module:
    backbone = IntermediateLayerGetter(dilated_mobilenet_v2(), {"3": "low", "18": "high"})
    return lraspp.LRASPP(backbone, 16, 1280, 5)


class Sliced(nn.Module):
    """The stages of a network as slices of its features."""

    def __init__(self, features: nn.Sequential, cuts: tuple[int, ...]):
        super().__init__()
        ends = (0, *cuts, len(features))
        self.stages = nn.ModuleList(features[a:b] for a, b in zip(ends, ends[1:], strict=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for stage in self.stages:
            x = stage(x)
            results.append(x)
        return results


class Reused(nn.Module):
    """A recurrent network: one block called again and again."""

    def __init__(self):
        super().__init__()
        features = mobilenet_v2(width_mult=0.5).features
        self.stem, self.block = features[:3], features[3]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


def flat_mobilenet_v1() -> nn.Module:
    """The form of most repositories: a Sequential of Sequentials of six layers."""

    def pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    shapes = ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
    return nn.Sequential(
        stem, *(pair(*shape) for shape in shapes), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def _torchvision(name: str) -> Model:
    return Model(partial(torchvision.models.get_model, name, weights=None, num_classes=10))


def _timm(name: str, size: tuple[int, int] = (64, 64), **settings) -> Model:
    return Model(partial(timm.create_model, name, pretrained=False, **settings), size)


def _segmentation(name: str) -> Model:
    settings = {"weights": None, "weights_backbone": None, "num_classes": 5}
    return Model(partial(torchvision.models.get_model, name, **settings))


def _transformers(task: str, size: tuple[int, int] = (64, 64), **settings) -> Model:
    def build() -> nn.Module:
        config = transformers.MobileNetV2Config(num_labels=5, depth_multiplier=0.5, **settings)
        return getattr(transformers, f"MobileNetV2For{task}")(config)

    return Model(build, size)


def _smp(architecture: str, encoder: str, **settings) -> Model:
    return Model(partial(smp.create_model, architecture, encoder, None, classes=3, **settings))


def _quantizable() -> nn.Module:
    return torchvision.models.quantization.mobilenet_v2(weights=None, quantize=False)


def _fused_mbconv() -> nn.Module:
    """The beginning of efficientnet_v2_s: one block of each of its first stages."""
    features = torchvision.models.efficientnet_v2_s(weights=None).features
    return nn.Sequential(features[0], *(features[i][0] for i in range(1, 6)))


def _efficientnet_of_transformers() -> nn.Module:
    config = transformers.EfficientNetConfig(
        width_coefficient=0.5, depth_coefficient=0.3, num_labels=5, hidden_dim=640
    )
    return transformers.EfficientNetForImageClassification(config)


def _mobile_vit() -> nn.Module:
    config = transformers.MobileViTConfig(hidden_sizes=[32, 48, 64], num_labels=5, image_size=64)
    return transformers.MobileViTForImageClassification(config)


def _mobilenet_v1_of_transformers() -> nn.Module:
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, num_labels=5)
    return transformers.MobileNetV1ForImageClassification(config)


MODELS: dict[str, Model] = {
    **{
        f"torchvision {name}": _torchvision(name)
        for name in (
            "mobilenet_v2",
            "mnasnet0_5",
            "mnasnet1_0",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "shufflenet_v2_x0_5",
            "efficientnet_b0",
            "resnet18",
        )
    },
    "torchvision efficientnet_v2_s, the first of every stage": Model(_fused_mbconv),
    "torchvision mobilenet_v2, width 0.35": Model(partial(mobilenet_v2, width_mult=0.35)),
    "torchvision mobilenet_v2, odd size": Model(partial(mobilenet_v2, width_mult=0.5), (75, 53)),
    "torchvision mobilenet_v2, quantizable": Model(_quantizable),
    "torchvision mobilenet_v2, sliced": Model(
        lambda: Sliced(mobilenet_v2(width_mult=0.5).features, (2, 4, 7, 14))
    ),
    "torchvision mobilenet_v2, a block reused": Model(Reused),
    "torchvision mnasnet0_5, sliced": Model(
        lambda: Sliced(torchvision.models.mnasnet0_5().layers, (3, 6, 9))
    ),
    "torchvision ssdlite320_mobilenet_v3_large": Model(ssdlite_mobilenet_v3),
    "torchvision SSDLite of mobilenet_v2": Model(ssdlite_mobilenet_v2),
    "torchvision deeplabv3_mobilenet_v3_large": _segmentation("deeplabv3_mobilenet_v3_large"),
    "torchvision lraspp_mobilenet_v3_large": _segmentation("lraspp_mobilenet_v3_large"),
    "torchvision DeepLabV3 of mobilenet_v2": Model(deeplab_mobilenet_v2),
    "torchvision LR-ASPP of mobilenet_v2": Model(lraspp_mobilenet_v2),
    **{
        f"timm {name}": _timm(name, num_classes=10)
        for name in (
            "mobilenetv2_100",
            "mobilenetv1_100",
            "tf_efficientnet_lite0",
            "mnasnet_small",
            "semnasnet_050",
            "fbnetv3_b",
            "mobilenetv3_small_100",
            "mobilenetv3_large_100",
            "tf_mobilenetv3_small_minimal_100",
            "mobilenetv4_conv_small",
            "mobilenetv4_conv_medium",
            "lcnet_050",
            "tinynet_e",
            "efficientnet_es",
            "efficientnet_b0",
            "hardcorenas_a",
            "mixnet_s",
            "ghostnet_100",
            "convnext_atto",
        )
    },
    "timm mobilenetv2_050, features": _timm("mobilenetv2_050", features_only=True),
    "timm mobilenetv2_050, output stride 8": _timm(
        "mobilenetv2_050", features_only=True, output_stride=8
    ),
    "efficientnet_lite_pytorch efficientnet-lite0": Model(
        partial(EfficientNet.from_name, "efficientnet-lite0")
    ),
    "transformers MobileNetV2, odd size": _transformers("ImageClassification", (75, 53)),
    "transformers MobileNetV2, tf_padding off": _transformers(
        "ImageClassification", tf_padding=False
    ),
    "transformers MobileNetV2, segmentation": _transformers(
        "SemanticSegmentation", output_stride=16
    ),
    "transformers MobileNetV2, segmentation, output stride 8": _transformers(
        "SemanticSegmentation", (65, 65), output_stride=8
    ),
    "transformers MobileNetV2, segmentation, output stride 8, tf_padding off": _transformers(
        "SemanticSegmentation", output_stride=8, tf_padding=False
    ),
    "transformers MobileNetV1": Model(_mobilenet_v1_of_transformers),
    "transformers MobileViT": Model(_mobile_vit),
    "transformers EfficientNet": Model(_efficientnet_of_transformers),
    "smp Unet of mobilenet_v2": _smp("unet", "mobilenet_v2"),
    "smp DeepLabV3+ of mobilenet_v2": _smp("deeplabv3plus", "mobilenet_v2"),
    "smp FPN of timm-tf_efficientnet_lite0": _smp("fpn", "timm-tf_efficientnet_lite0"),
    "smp Unet of efficientnet-b0": _smp("unet", "efficientnet-b0"),
    "a MobileNetV1 as nn.Sequential": Model(flat_mobilenet_v1),
}


def images(model: Model, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.size, dtype=dtype)
