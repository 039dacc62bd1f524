"""ExecuTorch with its XNNPACK delegate."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .peer import Loaded, Peer

FILE = "model.pte"


def convert(model: nn.Module, x: Tensor, folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # It finds layouts itself, and fails on weights that are channels_last already.
    model = model.to(memory_format=torch.contiguous_format)
    exported = torch.export.export(model, (x,))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    (folder / FILE).write_bytes(lowered.to_executorch().buffer)


def load(folder: Path, x: Tensor, threads: int) -> Loaded:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(str(folder / FILE))
    method = program.load_method("forward")
    results: list[Tensor] = []

    def run() -> None:
        results[:] = method.execute([x])

    return Loaded(run, lambda: results[0].clone())


MODULES = ("executorch.extension.pybindings.portable_lib", "executorch.runtime")
PEERS = (Peer("executorch", load, convert, ("executorch",), MODULES),)
