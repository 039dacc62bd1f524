"""MNN on the CPU in float32."""

from pathlib import Path

import torch
from torch import Tensor, nn

from . import onnx_file
from .peer import Loaded, Peer

FILE = "model.mnn"


def convert(model: nn.Module, x: Tensor, folder: Path) -> None:
    # The converter itself: its command line would install a package and report its use.
    import _tools

    onnx_file.convert(model, x, folder)
    arguments = ["mnnconvert", "-f", "ONNX", "--bizCode", "mnv2_kernels"]
    arguments += ["--modelFile", str(folder / onnx_file.FILE)]
    _tools.mnnconvert([*arguments, "--MNNModel", str(folder / FILE)])


def load(folder: Path, x: Tensor, threads: int) -> Loaded:
    import MNN
    import numpy

    settings = {"backend": "CPU", "numThread": threads, "precision": "high"}
    net = MNN.nn.load_module_from_file(
        str(folder / FILE),
        [onnx_file.INPUT],
        [onnx_file.OUTPUT],
        runtime_manager=MNN.nn.create_runtime_manager((settings,)),
    )
    given = MNN.expr.const(x.contiguous().numpy(), list(x.shape), MNN.expr.NCHW)
    results: list = []

    def run() -> None:
        results[:] = [net.forward(given)]
        # Nothing is sure to have been computed before it is read.
        results.append(results[0].read())

    return Loaded(run, lambda: torch.from_numpy(numpy.array(results[1])))


PEERS = (Peer("mnn", load, convert, ("MNN", *onnx_file.PACKAGES), ("MNN", "numpy")),)
