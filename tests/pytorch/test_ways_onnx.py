"""ONNX files hold the plain layers, whichever exporter writes them."""

import io

import pytest
import torch
from same_answers import randomise
from timm.models._efficientnet_blocks import InvertedResidual as TimmBlock
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
pytestmark = pytest.mark.usefixtures("kernel_backend", "one_thread")


def by_export(model: nn.Module, x: torch.Tensor):
    pytest.importorskip("onnxscript")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
    )
    return program.model_proto


def by_trace(model: nn.Module, x: torch.Tensor):
    file = io.BytesIO()
    axes = {"x": {0: "batch"}}
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "exporter, cached", [(by_export, True), (by_trace, False), (by_trace, True)]
)
def test_onnx_file_computes_the_same(exporter, cached):
    plain = randomise(
        nn.Sequential(
            TorchvisionBlock(4, 4, 1, 6),
            TimmBlock(4, 8, stride=2, exp_ratio=3.0, act_layer=nn.ReLU6),
            mk.InvertedResidual(8, 8, kernel_size=5),
        )
    )
    fused = mk.fuse(plain)
    x = torch.randn(2, 4, 8, 9)
    with torch.no_grad():
        if cached:
            fused(x)
        model = exporter(fused, x)
        onnx.checker.check_model(model)
        operators = {(node.domain, node.op_type) for node in model.graph.node}
        assert {domain for domain, _ in operators} == {""} and ("", "Conv") in operators
        evaluate = onnx.reference.ReferenceEvaluator(model)
        for images in (x, 3 * torch.randn(3, 4, 8, 9)):
            (y,) = evaluate.run(None, {model.graph.input[0].name: images.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), plain(images), rtol=1e-4, atol=1e-4)
        assert fused[0].why_plain(x) is None
