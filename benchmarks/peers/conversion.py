"""Models in the formats of peers: made once, in a process of their own, and kept in a folder."""

import hashlib
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from ..machine import ROOT
from .cases import Case
from .peer import Peer
from .process import WorkerProcess

CACHE = ROOT / "build" / "peers"


def converted(
    peer: Peer, case: Case, model: nn.Module, cache: Path, isa: str | None = None
) -> Path | None:
    """The folder that the peer loads from, filled now if it is not there; None if it needs none.

    isa: the key of `limits.LIMITS` that processes started now are asked to keep to, if any.

    Raises:
        WorkerFailed: the conversion does.
    """
    if peer.convert is None:
        return None
    made_for = f"-t{case.threads}" + (f"-{isa}" if isa else "") if peer.compiles else ""
    converter = peer.convert.__module__.rpartition(".")[2]
    folder = cache / f"{converter}-{case.workload}{made_for}-{_digest(peer, model)}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        log = cache / f"{peer.name}-convert.log"
        with WorkerProcess(peer.name, case.threads, log) as worker:
            worker.ask("convert", peer=peer.name, case=str(case), folder=str(made))
        os.rename(made, folder)
    return folder


def _digest(peer: Peer, model: nn.Module) -> str:
    """Of the weights, the converter and the versions: a conversion of others is not taken."""
    found = hashlib.sha256(inspect.getsource(sys.modules[peer.convert.__module__]).encode())
    found.update(json.dumps([torch.__version__, peer.versions()]).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
