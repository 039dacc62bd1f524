"""Every peer there is, ours first."""

from . import litert, ours
from .peer import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for module in (
        ours,
        litert,
    )
    for peer in module.PEERS
}
