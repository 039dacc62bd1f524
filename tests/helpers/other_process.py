"""A second process that writes into tensors it shares with this one; imports only torch."""

import torch


def scale_what_arrives(inbox, outbox) -> None:
    """Multiply every list of tensors that comes through the queue, until None comes."""
    torch.set_num_threads(1)
    while (tensors := inbox.get()) is not None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(0.9)
        count = len(tensors)
        del tensors
        outbox.put(count)
