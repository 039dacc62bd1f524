"""PyTorch's own compiler: `torch.compile` with freezing, and ahead of time (AOTInductor)."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from .peer import Loaded, Peer, of_module

FILE = "model.pt2"


def load_compiled(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    torch._dynamo.reset()
    torch._inductor.config.freezing = True
    return of_module(torch.compile(model), x)


def convert(model: nn.Module, x: Tensor, folder: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)),
        package_path=str(folder / FILE),
        inductor_configs={"freezing": True},
    )


def load_ahead_of_time(folder: Path, x: Tensor, threads: int) -> Loaded:
    return of_module(torch._inductor.aoti_load_package(str(folder / FILE)), x)


def why_no_compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs the C++ compiler {compiler}"


PEERS = (
    Peer("compiled", load_compiled, needs=why_no_compiler),
    Peer("aoti", load_ahead_of_time, convert, needs=why_no_compiler, compiles=True),
)
