"""Whether tensors are what they were: PyTorch's version counters, and what these do not count."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from .guard import optimizer_steps


def state_of(
    tensors: Sequence[Tensor], eps: Iterable[float], counters: Iterable[Tensor] = ()
) -> list | None:
    """What changes whenever weights folded from these would, as far as PyTorch counts changes.

    None where a tensor has no memory of its own (fake tensors, wrapper subclasses): it could be
    replaced by another that looks the same. `eps` are those of the batch norms, `counters` their
    `num_batches_tracked`: a batch in training mode changes the statistics uncounted, but these.
    """
    try:
        addresses = [*map(Tensor.data_ptr, tensors)]
        sizes = [*map(Tensor.numel, tensors)]
        # Of vectors, sizes say enough.
        sizes += [t.stride() for t in tensors if t.dim() > 1]
    except RuntimeError:
        return None
    if 0 in addresses:
        return None
    try:
        versions = [*map(_version_of, tensors), *map(_version_of, counters)]
        return [optimizer_steps(), *eps, *addresses, *sizes, *versions]
    except RuntimeError:
        # Inference tensors count no versions: only that one is replaced can be seen.
        return [*eps, *addresses, *sizes]


_version_of = Tensor._version.__get__
