"""The model as an ONNX file, which several runtimes read."""

from pathlib import Path

import torch
from torch import Tensor, nn

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript")
INPUT, OUTPUT = "x", "y"


def convert(model: nn.Module, x: Tensor, folder: Path) -> None:
    torch.onnx.export(
        model,
        (x.contiguous(),),
        str(folder / FILE),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
