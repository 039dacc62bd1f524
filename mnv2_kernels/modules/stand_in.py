"""A module in the place of another one, with the same children under the same names."""

from torch import Tensor, nn


class StandIn(nn.Module):
    """Base of what `fuse` puts into a model: another forward for the layers of `original`.

    Children, parameters and hooks are shared with the original, not copied: a change on either
    side is seen by both. Attributes that are not found here come from the original (`stride`,
    `out_channels`, `use_res_connect`, `has_skip` ...), so that code which reads them goes on
    working.
    """

    original: nn.Module

    def __init__(self, original: nn.Module):
        super().__init__()
        for name, value in list(vars(self).items()):
            if isinstance(value, dict):
                self.__dict__[name] = original.__dict__[name]
        self._is_full_backward_hook = original._is_full_backward_hook
        self.__dict__["original"] = original
        self.training = original.training

    def plain_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The original's forward with all its arguments."""
        # Not a call: the hooks, being shared, have been called already.
        return self.original.forward(x, *args, **kwargs)

    def _by_name(self, kwargs: dict) -> Tensor:
        return self.original.forward(**kwargs)

    def train(self, mode: bool = True) -> "StandIn":
        self.original.training = mode
        return super().train(mode)

    def _pass_on_mode(self) -> None:
        """Give the original the mode that was set on this module, however it was set."""
        original = self.__dict__["original"]
        if original.training is not self.training:
            original.training = self.training

    def __setattr__(self, name: str, value: object) -> None:
        """Attributes that only the original has are set there, where its forward reads them."""
        own = self.__dict__
        original = own.get("original")
        if original is not None and name not in own and name in original.__dict__:
            setattr(original, name, value)
        else:
            super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> "StandIn":
        """A replica with an original of its own, which has the replica's children."""
        replica = super()._replicate_for_data_parallel()
        original = self.original._replicate_for_data_parallel()
        for name in ("_modules", "_parameters", "_buffers"):
            original.__dict__[name] = replica.__dict__[name]
        replica.__dict__["original"] = original
        return replica

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)
