"""Every peer there is, ours first."""

from . import executorch, inductor, litert, mnn, ncnn, onnxruntime, openvino, ours, torch_layers
from .peer import Peer

MODULES = (
    ours,
    litert,
    executorch,
    openvino,
    onnxruntime,
    ncnn,
    mnn,
    inductor,
    torch_layers,
)
PEERS: dict[str, Peer] = {peer.name: peer for module in MODULES for peer in module.PEERS}
