"""ncnn in float32, converted by pnnx; it takes an image at a time."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .peer import Loaded, Peer

FILE = "model.pt"


def convert(model: nn.Module, x: Tensor, folder: Path) -> None:
    import pnnx

    model = model.to(memory_format=torch.contiguous_format)
    pnnx.export(model, str(folder / FILE), (x[:1].contiguous(),), fp16=False)


def load(folder: Path, x: Tensor, threads: int) -> Loaded:
    import ncnn
    import numpy

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    # Halves are the default, of pnnx too; this is the float32 peer.
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    stem = FILE.removesuffix(".pt")
    net.load_param(str(folder / f"{stem}.ncnn.param"))
    net.load_model(str(folder / f"{stem}.ncnn.bin"))
    given = [image.contiguous().numpy() for image in x]
    images = [ncnn.Mat(array) for array in given]
    results: list = []

    def run() -> None:
        results.clear()
        for image in images:
            extractor = net.create_extractor()
            extractor.input("in0", image)
            results.append(extractor.extract("out0")[1])

    def output() -> Tensor:
        return torch.stack([torch.from_numpy(numpy.array(y)) for y in results])

    return Loaded(run, output, holds=given)


PEERS = (Peer("ncnn", load, convert, ("ncnn", "pnnx"), ("ncnn", "numpy")),)
