"""Blocks that pad as TensorFlow's SAME does at stride 2: by the size of each input."""

from torch import Tensor, nn

from ..block.fold import BlockLayers
from ..modules.fused_module import FusedInvertedResidual


class FusedSamePadding(FusedInvertedResidual):
    """A recognised block whose depthwise pads by the size of its input.

    An even number of rows gets one zero fewer than an odd one, and so do columns: for each of the
    four paddings there is a block of that padding, with the same layers and the same original.
    """

    def __init__(self, original: nn.Module, layers: BlockLayers, backend: str | None = None):
        super().__init__(original, layers, backend)
        # No child: its layers are children of this block already.
        self.__dict__["_padded"] = {
            parity: FusedInvertedResidual(original, layers.at(*parity), backend)
            for parity in ((0, 0), (0, 1), (1, 0), (1, 1))
        }

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / 2), ceil(W / 2))."""
        if not isinstance(x, Tensor):
            return super().forward(x, *args, **kwargs)
        if x.dim() != 4:
            return self.plain_forward(x, *args, **kwargs)
        block = self._padded[x.shape[2] % 2, x.shape[3] % 2]
        block.training, block.backend = self.training, self.backend
        return block.forward(x, *args, **kwargs)

    def train(self, mode: bool = True) -> "FusedSamePadding":
        for block in self._padded.values():
            block.forget_folded()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FusedSamePadding":
        for block in self._padded.values():
            block.forget_folded()
        return super()._apply(*args, **kwargs)
