"""PyTorch layer by layer, channels_last: as written, and with batch norm folded."""

import torch
from torch import Tensor, nn

from mnv2_kernels.profiling.variants import plain

from .peer import Loaded, Peer, of_module


def load_eager(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    return of_module(plain(model).to(memory_format=torch.channels_last), x)


def load_folded(model: nn.Module, x: Tensor, threads: int) -> Loaded:
    return of_module(model, x)


PEERS = (Peer("folded", load_folded), Peer("eager", load_eager, as_written=True))
