"""Modules that run fused where that is exact, and their plain layers where it is not.

`FusedModule` holds what all of them share: what the plain forward computes is read once, its folded
weights are kept, and before every call a guard says whether both still hold.
"""

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from ..block.config import BlockConfig
from ..block.fold import BlockLayers
from ..ops.backends import Block, asked_once_a_graph, choose, is_for_layers, why_no_kernel
from ..ops.inverted_residual import OpArguments
from ..ops.mbconv import MBConvArguments
from ..recognizers import (
    Declined,
    Reading,
    Recorded,
    block_of,
    read,
    read_unknown,
    unrecorded,
)
from .compiled import folds_when_run, run_layers
from .folded import fold, kept_folded, padded, run_block
from .kept import Kept, State
from .stand_in import StandIn
from .tracing import has_global_hooks, is_observed, is_plain_call, trace_symbolically
from .training import train_block, why_untrained, why_untrained_with


class Call(NamedTuple):
    """What a call comes to: the block that it computes, or why its layers have to run."""

    layers: BlockLayers | None
    chosen_by: Block | None
    reason: str | None


class _Block:
    """What a plain forward was last read as, and whether that holds for one shape of x alone."""

    def __init__(self, layers: BlockLayers, is_sized: bool):
        self.take(layers, is_sized)

    def take(self, layers: BlockLayers, is_sized: bool) -> None:
        norms = [stage.norm for stage in layers.stages]
        self.batch_norms = [n for n in norms if isinstance(n, nn.modules.batchnorm._BatchNorm)]
        self.layers, self.is_sized = layers, is_sized
        # Made here, since the compiler does not trace how.
        self.chosen_by = Block.of(layers.config, layers.clips)

    def uses_batches(self) -> bool:
        """Whether a batch norm is in training mode, and uses the statistics of the batch."""
        return any(norm.training for norm in self.batch_norms)


class FusedModule(nn.Module):
    """A block with plain layers, whose forward runs the fused kernel wherever that is exact.

    Subclasses give `plain_forward`, the layers one by one, and end their constructor with
    `_take_over`.
    """

    backend: str | None = None
    _block: "_Block"
    _kept: dict[bool, Kept]

    def plain_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The block layer by layer; further arguments go to the original module."""
        raise NotImplementedError

    def forward(self, x: Tensor = None, *args, **kwargs) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out), channels_last where the kernel ran.

        A graph that is recorded holds the op and the folding before it, one that is compiled for
        inference on a CPU an op that folds when it has to (`compiled`). Inside the transforms of
        `torch.func` (vmap, grad, jvp ...) and in ONNX files the plain layers stand for the block.
        The layers also run where x has another name in the forward of the original, and is given
        by it.
        """
        if not isinstance(x, Tensor):
            if x is None and kwargs:
                return self._by_name(kwargs)
            return trace_symbolically(self, x, args, kwargs)
        # Before the compiler is asked for: it runs what reads a forward while it compiles.
        if type(x) is Recorded:
            return self.plain_forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._compiled_forward(x, *args, **kwargs)
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"mnv2_kernels::{self.config.name}"):
                return self._eager_forward(x, *args, **kwargs)
        return self._eager_forward(x, *args, **kwargs)

    def _eager_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        backend, observed = self._backend_of(x)
        if backend is None:
            self._pass_on_mode()
            return self.plain_forward(x, *args, **kwargs)
        if self._uses_batches():
            return self._training_forward(x, args, kwargs, backend == "cpu" and not observed)
        state = self._look()
        with unrecorded() if observed else nullcontext():
            layers, chosen_by, _ = self._call_for(state, x, args, kwargs, observed)
            fits = layers is not None and _fits(layers, x)
        if not fits:
            return self.plain_forward(x, *args, **kwargs)
        # The others run every block.
        if backend in ("cuda", "triton"):
            backend = choose(self.backend, x, chosen_by)
            if backend == "reference" != self.backend:
                return self.plain_forward(x, *args, **kwargs)
        if observed:
            if torch.onnx.is_in_onnx_export():
                return self.plain_forward(x, *args, **kwargs)
            return run_block(layers, backend, x, *fold(layers))
        trains = torch.is_grad_enabled() and state.requires_grad
        if trains and backend == "reference":
            return run_block(layers, backend, x, *fold(layers))
        # The op would compute its forward pass a second time for the gradients.
        if trains and not (layers.is_classic and layers.lead is None):
            return self.plain_forward(x, *args, **kwargs)
        return run_block(layers, backend, x, *kept_folded(state, layers), trains)

    def _backend_of(self, x: Tensor) -> tuple[str | None, bool]:
        """What runs a call with x, None where the layers do; and whether `is_observed`.

        Asked before the modules are looked at, since the layers may run without.
        """
        if self.backend is None and is_plain_call(x):
            return "cpu", False
        if is_for_layers(self.backend, x):
            return None, False
        backend = choose(self.backend, x, None)
        if (
            backend == "reference" != self.backend
            or torch._C._are_functorch_transforms_active()
            or has_global_hooks()
        ):
            return None, False
        return backend, is_observed()

    def _training_forward(self, x: Tensor, args: tuple, kwargs: dict, has_kernel: bool) -> Tensor:
        self._pass_on_mode()
        if has_kernel:
            layers = self._call_for(self._kept[True].look(), x, args, kwargs, live=True).layers
            if layers is not None and _fits(layers, x) and why_untrained_with(layers, x) is None:
                y = train_block(padded(x, layers.pads), layers)
                return y + x if layers.adds else y
        return self.plain_forward(x, *args, **kwargs)

    def _compiled_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        backend = None
        if not (torch.onnx.is_in_onnx_export() or args or kwargs):
            backend = self._backend_when_compiled(x)
        if backend is None:
            return self.plain_forward(x, *args, **kwargs)
        layers = self.block_layers
        if backend == "cpu" and folds_when_run(x, layers):
            return run_layers(x, layers)
        return run_block(layers, backend, x, *fold(layers))

    def _backend_when_compiled(self, x: Tensor) -> str | None:
        """What a compiled call runs on; the modes that the modules have now become a part of it."""
        if self._block.is_sized or self._block.uses_batches():
            return None
        # The mode is given for the compiler to see that the answer depends on it.
        if not self._reads_as_block(self.training):
            return None
        backend = choose(self.backend, x, self.chosen_by)
        return None if backend == "reference" != self.backend else backend

    @asked_once_a_graph
    def _reads_as_block(self, training: bool) -> bool:
        """Whether the plain forward is a block in the current modes; `block_layers` is then set.

        Read anew: a program that is exported has other tensors in place of the parameters, of which
        nothing may be kept.
        """
        self._pass_on_mode()
        try:
            reading = read_unknown(self)
            self._block.take(block_of(reading), reading.is_sized)
        except Declined:
            return False
        return not reading.is_sized

    @property
    def fused_blocks(self) -> "list[FusedModule]":
        """The blocks that run here: this one."""
        return [self]

    @property
    def block_layers(self) -> BlockLayers:
        """What the plain forward was last read as."""
        return self._block.layers

    @property
    def config(self) -> BlockConfig:
        """Sizes of the block."""
        return self.block_layers.config

    @property
    def chosen_by(self) -> Block:
        """What a backend is chosen by, besides x."""
        return self._block.chosen_by

    def why_plain(self, x: Tensor | None = None) -> str | None:
        """Why a forward of x would run the plain layers; None where it would run fused."""
        call = self.call_for(x)
        if call.reason is not None or x is None:
            return call.reason
        reason = why_no_kernel(x, call.chosen_by) if self.backend is None else None
        if reason is None and self._uses_batches():
            return why_untrained_with(call.layers, x)
        return reason

    def call_for(self, x: Tensor | None) -> "Call":
        """What a call with x comes to as far as the layers decide it; None is an x of any size."""
        if self._uses_batches():
            self._pass_on_mode()
            if self.backend not in (None, "cpu"):
                reason = f"batch norm is in training mode, and the backend is {self.backend!r}"
                return Call(None, None, reason)
            return self._call_for(self._kept[True].look(), x, (), {}, live=True)
        return self._call_for(self._look(), x, (), {})

    def folded_arguments(self) -> OpArguments | MBConvArguments:
        """The op's arguments after x for the current parameters, without a graph to them.

        The same tensors until a weight, a module, a mode or a hook changes.
        """
        state = self._look()
        self._call_for(state, None, (), {})
        if state.why_blind is not None:
            with torch.no_grad():
                return fold(self.block_layers).arguments
        return kept_folded(state, self.block_layers).arguments

    def _take_over(self, reading: Reading) -> None:
        """Remember what the plain forward was read as."""
        # Not to be seen as children. The objects stay the same, for a guard to see no change.
        self.__dict__["_block"] = _Block(block_of(reading), reading.is_sized)
        # With live norms apart, so that a model that trains and evaluates by turns is read once for
        # each.
        self.__dict__["_kept"] = {live: Kept(self) for live in (False, True)}

    def _uses_batches(self) -> bool:
        """Whether a batch norm that was read is in training mode, and is still inside."""
        block = self._block
        return block.uses_batches() and set(block.batch_norms).issubset(self.modules())

    def _look(self) -> State:
        self._pass_on_mode()
        return self._kept[False].look()

    def _by_name(self, kwargs: dict) -> Tensor:
        """A call without an x by position."""
        return self.plain_forward(**kwargs)

    def _pass_on_mode(self) -> None:
        """Give the module whose forward is read the mode that was set on this one."""

    def _call_for(
        self,
        state: State,
        x: Tensor | None,
        args: tuple,
        kwargs: dict,
        observed: bool = False,
        live: bool = False,
    ) -> Call:
        """What the plain forward computes of such an x: looked up, or read now.

        `live`: batch norms in training mode are read like others, for the kernel that trains.
        """
        if state.why_blind is not None:
            if not observed:
                return Call(None, None, state.why_blind)
            # The current forward is recorded, and the tensors are often stand-ins.
            x = None
        key: Any = None
        if args or kwargs:
            key = _key_of(args, kwargs)
            if key is None:
                return Call(None, None, "it is called with further arguments")
        is_image = x is not None and x.dim() == 4 and x.shape[1] == self.config.in_channels
        shape = x.shape if is_image else None
        if key is not None and shape is None:
            return Call(None, None, "it is called with further arguments and no image")
        call = state.readings.get(key) or state.readings.get((key, shape))
        return self._read(state, key, shape, args, kwargs, live) if call is None else call

    def _read(
        self, state: State, key: Hashable, shape, args: tuple, kwargs: dict, live: bool
    ) -> Call:
        is_sized = True
        try:
            if shape is None:
                reading = read_unknown(self, live_norms=live)
            else:
                calls = [lambda x: self.plain_forward(x, *args, **kwargs)]
                reading = read(self, shape, calls, live)
            layers = block_of(reading)
            reason = why_untrained(layers) if live else None
            if reason is not None:
                raise Declined(reason)
        except Declined as reason:
            # Another shape may be read.
            call = Call(None, None, str(reason))
        else:
            is_sized = reading.is_sized
            call = Call(layers, Block.of(layers.config, layers.clips), None)
            if key is None and not live:
                self._block.take(layers, is_sized)
        if state.why_blind is None:
            state.readings.keep((key, shape) if is_sized else key, call)
        elif is_sized and call.reason is None:
            return Call(None, None, state.why_blind)
        return call

    def train(self, mode: bool = True) -> "FusedModule":
        return self if self._kept[False].is_in_mode(mode) else super().train(mode)

    def _replicate_for_data_parallel(self) -> "FusedModule":
        """A replica that runs the layers: what is folded are the weights of the first device."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["forward"] = replica.plain_forward
        return replica

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for; it would put a replacement into the caller's model."""
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__name__} cannot be scripted; use torch.export or"
            " torch.jit.trace, or script the model that `unfuse` returns"
        )


def _fits(layers: BlockLayers, x: Tensor) -> bool:
    """Whether the op takes x: the layers say themselves what is wrong with another one."""
    if x.dim() != 4 or x.shape[1] != layers.config.in_channels:
        return False
    weight = layers.project.conv.weight
    if x.device != weight.device or not layers.fits(*x.shape[2:]):
        return False
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)


def _key_of(args: tuple, kwargs: dict) -> Hashable | None:
    """Further arguments as a key; None where they are no plain values."""
    values = (*args, *kwargs.values())
    if not all(v is None or isinstance(v, bool | int | float | str) for v in values):
        return None
    kinds = tuple(map(type, values))
    return args, tuple(kwargs.items()), kinds


class FusedInvertedResidual(StandIn, FusedModule):
    """A block of another library, with the same children under the same names."""

    def __init__(self, original: nn.Module, reading: Reading, backend: str | None = None):
        super().__init__(original)
        self.backend = backend
        self._take_over(reading)

    def extra_repr(self) -> str:
        layers = self.block_layers
        lead = ", another depthwise first" if layers.lead else ""
        return f"fused {self.config.name}, residual={self.config.residual or layers.adds}{lead}"
