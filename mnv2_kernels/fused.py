"""Modules that run fused where that is exact, and their plain layers where it is not.

`FusedModule` holds what all of them share: when the kernel may run, and the folded weights as a
cache that follows the parameters. `FusedInvertedResidual` is the drop-in around a block of another
library.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from .backends import why_no_kernel
from .block import BlockConfig
from .fold import BlockLayers, FoldedWeights, fold_layers
from .ops import inverted_residual


class FusedModule(nn.Module):
    """A block with plain layers, whose forward runs the fused kernel wherever that is exact.

    Subclasses give `block_layers` (what to fold) and `plain_forward` (the layers one by one).
    """

    block_layers: BlockLayers
    backend: str | None = None
    _folded: tuple[list, FoldedWeights, list[Tensor]] | None = None

    def plain_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The block layer by layer; any further arguments are those of the original module."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out), channels_last where the kernel ran."""
        if self.why_plain(x) is not None:
            return self.plain_forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self.run(x, fold_layers(self.block_layers))
        if torch.is_grad_enabled():
            tensors = self._watched.tensors()
            if any(t.requires_grad for t in tensors):
                if self.backend == "reference":
                    return self.run(x, fold_layers(self.block_layers))
                return _FromParameters.apply(self, x, *tensors)
        return self.run(x, self.folded_weights())

    def run(self, x: Tensor, weights: FoldedWeights) -> Tensor:
        """The op with this block's settings."""
        return inverted_residual(x, weights, **self._watched.settings, backend=self.backend)

    @property
    def config(self) -> BlockConfig:
        """Sizes of the block."""
        return self.block_layers.config

    def why_plain(self, x: Tensor | None = None) -> str | None:
        """Why a forward of x would run the plain layers; None where it would run fused."""
        watched = self._watched
        for norm in watched.batch_norms:
            if norm.training:
                return "batch norm is in training mode and needs the statistics of whole tensors"
        if self.training:
            return "the module is in training mode"
        if not torch.compiler.is_compiling() and (reason := watched.why_changed()) is not None:
            return reason
        if self.backend is None and x is not None:
            return why_no_kernel(x)
        return None

    def folded_weights(self) -> FoldedWeights:
        """The folded weights of the parameters as they are now, without a graph to them.

        Cached until a parameter or buffer changes. PyTorch's version counters see every change but
        those of fused optimizers, whose steps are counted, and those made through `.data`, for
        which `train()`, `eval()` and `to()` drop the cache too.
        """
        state = self._watched.state()
        if self._folded is None or self._folded[0] != state:
            # The aliases keep the old storages alive, so that no new tensor gets their address.
            aliases = [t.detach() for t in self._watched.tensors()]
            # Not inference tensors: a later call may need gradients of x through them.
            with torch.inference_mode(False), torch.no_grad():
                self.__dict__["_folded"] = (state, fold_layers(self.block_layers), aliases)
        return self._folded[1]

    def _watch(self) -> None:
        """Remember what the fused forward takes for granted; the end of every constructor."""
        self.__dict__["_watched"] = _Watched(self, self.block_layers)

    def train(self, mode: bool = True) -> "FusedModule":
        self.__dict__["_folded"] = None
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FusedModule":
        self.__dict__["_folded"] = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_folded": None}


class _Watched:
    """What a fused forward looks at on every call, gathered once so that looking is cheap."""

    def __init__(self, block: FusedModule, layers: BlockLayers):
        inner = [m for m in block.modules() if m is not block]
        stages = [s for s in (layers.expand, layers.depthwise, layers.project) if s is not None]
        norms = [s.norm for s in stages if s.norm is not None]
        config = layers.config
        self.settings = {
            "stride": config.stride,
            "padding": config.padding,
            "dilation": config.dilation,
            "residual": config.residual,
        }
        self.batch_norms = [n for n in norms if isinstance(n, nn.modules.batchnorm._BatchNorm)]
        self.hooks = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.children = [(m._modules, list(m._modules.values())) for m in (block, *inner)]
        self.convs = [(s.conv, _geometry(s.conv)) for s in stages]
        # Where the tensors are looked up: a parameter may be replaced by another.
        self.places = [
            (tensors, name)
            for module in (*(s.conv for s in stages), *norms)
            for tensors in (module._parameters, module._buffers)
            for name in tensors
            if name != "num_batches_tracked"
        ]

    def why_changed(self) -> str | None:
        """What happened to the inner layers that only the plain layers follow."""
        for hooks in self.hooks:
            if hooks:
                return "an inner module has hooks"
        for modules, children in self.children:
            if list(modules.values()) != children:
                return "inner modules have been replaced: unfuse, then fuse again"
        for conv, geometry in self.convs:
            if _geometry(conv) != geometry:
                return "a convolution has been changed: unfuse, then fuse again"
        return None

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer that the folded weights are computed from."""
        return [t for tensors, name in self.places if (t := tensors[name]) is not None]

    def state(self) -> list:
        """Equal for two calls exactly if the tensors hold the same values."""
        try:
            return [_optimizer_steps, *((t.data_ptr(), t._version) for t in self.tensors())]
        except RuntimeError:
            # Inference tensors count no versions: only that one is replaced can be seen.
            return [t.data_ptr() for t in self.tensors()]


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.stride, conv.padding, conv.dilation


# Fused optimizers change parameters without counting it in their versions.
_optimizer_steps = 0


def _count_step(optimizer, args, kwargs) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class _FromParameters(torch.autograd.Function):
    """y of x and the unfolded parameters: the forward pass uses the cached folded weights.

    The backward pass folds again, with a graph, and recomputes the block.
    """

    @staticmethod
    def forward(ctx, block: FusedModule, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x, *tensors)
        return block.run(x, block.folded_weights())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        _, x_needs_grad, *tensors_need_grad = ctx.needs_input_grad
        with torch.enable_grad():
            x = x.detach().requires_grad_(x_needs_grad)
            y = ctx.block.run(x, fold_layers(ctx.block.block_layers))
        wanted = [t for t, needed in zip(tensors, tensors_need_grad, strict=True) if needed]
        if x_needs_grad:
            wanted.insert(0, x)
        grads = iter(torch.autograd.grad(y, wanted, grad_y))
        return None, *(next(grads) if needed else None for needed in ctx.needs_input_grad[1:])


class FusedInvertedResidual(FusedModule):
    """A recognised block of another library, with the same children under the same names.

    Attributes that are not found here come from the original module (`stride`, `out_channels`,
    `use_res_connect`, `has_skip` ...), so that code which reads them goes on working.
    """

    def __init__(self, original: nn.Module, layers: BlockLayers, backend: str | None = None):
        super().__init__()
        # Children, parameters and hooks are shared with the original, not copied: a change on
        # either side is seen by both.
        for name, value in list(vars(self).items()):
            if isinstance(value, dict):
                self.__dict__[name] = original.__dict__[name]
        self._is_full_backward_hook = original._is_full_backward_hook
        self.__dict__["original"] = original
        self.block_layers = layers
        self.backend = backend
        self.training = original.training
        self._watch()

    def plain_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        # Not a call: the hooks, being shared, have been called already.
        return self.original.forward(x, *args, **kwargs)

    def train(self, mode: bool = True) -> "FusedInvertedResidual":
        self.original.training = mode
        return super().train(mode)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def extra_repr(self) -> str:
        return f"fused {self.config.name}, residual={self.config.residual}"
