"""Modules that run fused where that is exact, and their plain layers where it is not.

`FusedModule` holds what all of them share: when the kernel may run, and the folded weights as a
cache that follows the parameters. `FusedInvertedResidual` is the drop-in around a block of another
library.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from ..block.config import NO_CLIP, BlockConfig
from ..block.fold import BlockLayers, ConvNorm, fold_layers
from ..ops.backends import Block, choose, is_for_layers, why_no_kernel
from ..ops.inverted_residual import op_arguments, run
from .autograd import StageTensors, fold_without_graph, run_with_gradients
from .compiled import folds_when_run, forget, run_layers
from .freeze import is_frozen, why_mode_matters
from .snapshot import Remembered
from .stand_in import StandIn
from .tracing import is_observed, trace_symbolically
from .watched import Folded, Watched, fold_once


class FusedModule(nn.Module):
    """A block with plain layers, whose forward runs the fused kernel wherever that is exact.

    Subclasses give `block_layers` (what to fold) and `plain_forward` (the layers one by one).
    """

    block_layers: BlockLayers
    backend: str | None = None
    _folded: Folded | None = None

    def plain_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The block layer by layer; any further arguments are those of the original module."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out), channels_last where the kernel ran.

        A graph that is recorded holds the op and the folding before it, one that is compiled for
        inference on a CPU an op that folds when it has to (`compiled`). Inside the transforms of
        `torch.func` (vmap, grad, jvp ...) and in ONNX files the plain layers stand for the block.
        """
        if not isinstance(x, Tensor):
            return trace_symbolically(self, x, args, kwargs)
        if torch.compiler.is_compiling():
            backend = None if torch.onnx.is_in_onnx_export() else self._backend_for(x)
            if backend is None:
                return self.plain_forward(x, *args, **kwargs)
            if backend == "cpu" and folds_when_run(x, self.block_layers):
                watched = self._watched
                return run_layers(x, self.block_layers, watched.clips, watched.settings)
            return run(backend, x, self._fold_arguments())
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"mnv2_kernels::{self.config.name}"):
                return self._eager_forward(x, *args, **kwargs)
        return self._eager_forward(x, *args, **kwargs)

    def _eager_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if is_for_layers(self.backend, x):
            return self.plain_forward(x, *args, **kwargs)
        settled = self._remembered.get()
        backend = self._backend_for(x) if settled is None else self._chosen_for(x)
        if backend is None or torch._C._are_functorch_transforms_active():
            return self.plain_forward(x, *args, **kwargs)
        if is_observed():
            if torch.onnx.is_in_onnx_export():
                return self.plain_forward(x, *args, **kwargs)
            return run(backend, x, self._fold_arguments())
        if (
            torch.is_grad_enabled()
            and (settled is None or settled.requires_grad)
            and any(t.requires_grad for t in self._watched.tensors())
        ):
            if backend == "reference":
                return run(backend, x, self._fold_arguments())
            stages = self._watched.stage_tensors()
            return run_with_gradients(backend, x, self.folded_arguments(), stages)
        return run(backend, x, self._look() if settled is None else settled.arguments)

    @property
    def config(self) -> BlockConfig:
        """Sizes of the block."""
        return self.block_layers.config

    @property
    def chosen_by(self) -> Block:
        """What a backend is chosen by, beside x."""
        return self._watched.block

    def why_plain(self, x: Tensor | None = None) -> str | None:
        """Why a forward of x would run the plain layers; None where it would run fused."""
        reason = self._why_layers_needed()
        if reason is None and self.backend is None and x is not None:
            return why_no_kernel(x, self.chosen_by)
        return reason

    def _why_layers_needed(self) -> str | None:
        watched = self._watched
        if watched.why_overridden is not None:
            return watched.why_overridden
        for norm in watched.batch_norms:
            if norm.training:
                return "batch norm is in training mode and needs the statistics of whole tensors"
        for drop in watched.drops:
            if drop.training:
                return f"{type(drop).__name__} is in training mode and drops values"
        if self.training:
            if not all(map(is_frozen, watched.batch_norms)):
                return "the module is in training mode, and its batch norms are not frozen"
            if watched.why_mode_matters is not None:
                return f"the module is in training mode, and {watched.why_mode_matters}"
        return None if torch.compiler.is_compiling() else watched.why_changed()

    def _backend_for(self, x: Tensor) -> str | None:
        """What a forward of x runs on; None for the plain layers."""
        if self._why_layers_needed() is not None:
            return None
        return self._chosen_for(x)

    def _chosen_for(self, x: Tensor) -> str | None:
        backend = choose(self.backend, x, self._watched.block)
        # The layers themselves are as good as the reference, which has to be asked for.
        return None if backend == "reference" != self.backend else backend

    def _look(self) -> tuple:
        """The folded arguments; where they are those of the last call, the next ones need not look
        at every layer.
        """
        before, arguments = self._folded, self.folded_arguments()
        if before is not None and arguments is before.value:
            self._remembered.offer(self.modules, self._settled)
        return arguments

    def _settled(self) -> "_Settled | None":
        if self._why_layers_needed() is not None:
            return None
        requires_grad = any(t.requires_grad for t in self._watched.tensors())
        return _Settled(self.folded_arguments(), requires_grad)

    def folded_arguments(self) -> tuple:
        """The op's arguments behind x for the parameters as they are now, without a graph to them.

        Cached until a parameter or buffer changes. PyTorch's version counters see every change but
        those of fused optimizers, whose steps are counted, and those made through `.data`, for
        which `train()`, `eval()` and `to()` drop the cache too.
        """
        known = self._folded  # Read once: another thread may drop it.
        folded = fold_once(self._watched, known, self._fold_without_graph)
        if folded is None:
            with torch.no_grad():
                return self._fold_arguments()
        if folded is not known:
            self.__dict__["_folded"] = folded
        return folded.value

    def _fold_without_graph(self) -> tuple:
        watched = self._watched
        folded = fold_without_graph(watched.stage_tensors())
        if folded is None:
            return self._fold_arguments()
        return *folded, *watched.settings.values(), *watched.clips

    def _fold_arguments(self) -> tuple:
        return op_arguments(fold_layers(self.block_layers), **self._watched.settings)

    def _watch(self) -> None:
        """Remember what the fused forward takes for granted; the end of every constructor."""
        self.__dict__["_watched"] = _WatchedBlock(self, self.block_layers)
        self.__dict__["_remembered"] = Remembered()

    def forget_folded(self) -> None:
        """Drop the cached folded weights: the next forward folds again."""
        self.__dict__["_folded"] = None
        self._remembered.forget()
        forget(self.block_layers)

    def train(self, mode: bool = True) -> "FusedModule":
        self.forget_folded()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FusedModule":
        self.forget_folded()
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> "FusedModule":
        """A replica that runs the layers: what is folded are the weights of the first device."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["forward"] = replica.plain_forward
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_folded": None, "_remembered": Remembered()}

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for; it would put a replacement into the caller's model."""
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__name__} cannot be scripted; use torch.export or"
            " torch.jit.trace, or script the model that `unfuse` returns"
        )


class _Settled(NamedTuple):
    """Of a block that its layers are not needed for."""

    arguments: tuple
    requires_grad: bool


def why_overridden(
    block: FusedModule, methods: Sequence[str] = ("forward", "plain_forward", "__call__")
) -> str | None:
    """Which of these methods somebody's own class has in place of those of the package."""
    kind = type(block)
    for method in methods:
        if getattr(kind, method).__module__.partition(".")[0] not in ("mnv2_kernels", "torch"):
            return f"{kind.__name__} overrides {method}"
    return None


class _WatchedBlock(Watched):
    """The same of a block, and what its layers say of the op's arguments."""

    def __init__(self, block: FusedModule, layers: BlockLayers):
        stages = layers.expand, layers.depthwise, layers.project
        super().__init__(block, [s for s in stages if s is not None])
        self.stages = [None if s is None else (_places_of(s), s.norm) for s in stages]
        config = layers.config
        self.settings = {
            "stride": config.stride,
            "padding": config.padding,
            "dilation": config.dilation,
            "residual": config.residual,
        }
        expand_clip = layers.expand.clip if layers.expand else NO_CLIP
        self.clips = (expand_clip, layers.depthwise.clip, layers.project.clip)
        self.block = Block.of(config, self.clips)
        self.why_overridden = why_overridden(block, ["plain_forward"])
        self.drops = layers.drops
        self.why_mode_matters = why_mode_matters(getattr(block, "original", block), FusedModule)

    def stage_tensors(self) -> list[StageTensors | None]:
        """What expansion, depthwise and projection are folded from, as it is now."""
        found = []
        for stage in self.stages:
            if stage is None:
                found.append(None)
                continue
            places, norm = stage
            tensors = (p if p is None else p[0][p[1]] for p in places)
            found.append(StageTensors(*tensors, 0.0 if norm is None else norm.eps))
        return found


def _places_of(stage: ConvNorm) -> list[tuple[dict, str] | None]:
    """Where the six tensors of a stage are looked up: they may be replaced by others."""
    conv = [_place(stage.conv, name) for name in ("weight", "bias")]
    norm = ("weight", "bias", "running_mean", "running_var")
    return conv + [_place(stage.norm, name) for name in norm]


def _place(module: nn.Module | None, name: str) -> tuple[dict, str] | None:
    """Where a tensor of the module is looked up; None where it has none of that name."""
    if module is None:
        return None
    tables = module._parameters, module._buffers
    return next(((table, name) for table in tables if name in table), None)


class FusedInvertedResidual(StandIn, FusedModule):
    """A recognised block of another library, with the same children under the same names."""

    def __init__(self, original: nn.Module, layers: BlockLayers, backend: str | None = None):
        super().__init__(original)
        self.block_layers = layers
        self.backend = backend
        self._watch()

    def extra_repr(self) -> str:
        return f"fused {self.config.name}, residual={self.config.residual}"
