"""What has to hold of modules for their forward to be read, and for a call of it to be left out."""

import gc
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import FrameType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from .declined import Declined, describe

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Functions that do something besides computing a result, or whose answer is another one later.
_EFFECTS = {
    *(print, open, input, exec, breakpoint, warnings.warn),
    *(torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled),
    *(time.time, time.perf_counter, time.monotonic),
}
_MODULES_WITH_EFFECTS = ("logging", "random", "subprocess")
# These call a forward. Where one of them is the nearest caller from PyTorch or this package, the
# forward itself has made the call.
_CALLERS = ("torch.nn.modules.module", f"{__package__}.read")


def check_module(function: str, module: object, argument: str = "model") -> None:
    """TypeError, in the name of a public function, where its argument is not a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{function}: {argument} must be a torch.nn.Module, got {type(module).__name__}"
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module calls hooks too."""
    own = vars(module)
    return any(own[name] for name in _HOOKS)


def overrides_call(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward and its hooks."""
    kind = type(module)
    usual = kind.__call__ is nn.Module.__call__ and kind._call_impl is nn.Module._call_impl
    return not usual and not isinstance(module, torch.jit.ScriptModule)


def check_untouched(module: nn.Module) -> None:
    """Decline where a call of a module inside would be missed, or where tensors cannot be folded.

    Hooks of `module` itself do not matter: they are called before and after its forward.
    """
    for name, inner in module.named_modules():
        where = f"{name} ({describe(inner)})" if name else "this very module"
        if isinstance(inner, torch.jit.ScriptModule):
            raise Declined(f"{where} is scripted and cannot be read")
        if parametrize.is_parametrized(inner):
            raise Declined(f"{where} is parametrized")
        if "forward" in vars(inner) or "_conv_forward" in vars(inner):
            raise Declined(f"the forward of {where} has been replaced")
        if overrides_call(inner):
            raise Declined(f"{where} overrides __call__")
        if inner is not module and has_hooks(inner):
            raise Declined(f"{where} has hooks, which would not be called")
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise Declined(f"{name} is not initialised yet")
        if tensor.is_complex():
            raise Declined(f"{name} is complex")
        if _redefines_functions(type(tensor)):
            raise Declined(f"{name} is a {type(tensor).__name__}, whose class redefines functions")
        if tensor.layout != torch.strided:
            raise Declined(f"{name} is not dense: {tensor.layout}")


def _redefines_functions(kind: type[torch.Tensor]) -> bool:
    usual = (torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    function = kind.__torch_function__
    return getattr(function, "__func__", function) not in usual


def _is_asked_by_forward(frame: FrameType | None) -> bool:
    """Whether the forward made a call itself, and not PyTorch or this package on its behalf."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("torch.", __package__)):
            return name in _CALLERS
        frame = frame.f_back
    return True


@contextmanager
def only_computing() -> Iterator[None]:
    """Declines if functions are called from outside of PyTorch that do more than compute.

    Nothing is seen while another Python profiler runs. Garbage collection is off meanwhile, since
    it may call finalizers.
    """
    called: list[str] = []

    def see(frame: FrameType, event: str, function: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.partition(".")[0] in _MODULES_WITH_EFFECTS:
            what = f"{name}.{frame.f_code.co_name}"
        elif event == "c_call" and function in _EFFECTS:
            what = function.__name__
        else:
            return
        if _is_asked_by_forward(frame):
            called.append(what)

    watches, collects = sys.getprofile() is None, gc.isenabled()
    gc.disable()
    if watches:
        sys.setprofile(see)
    try:
        yield
    finally:
        if watches:
            sys.setprofile(None)
        if collects:
            gc.enable()
    if called:
        raise Declined(f"its forward does more than compute: it calls {called[0]}")


@contextmanager
def unrecorded() -> Iterator[None]:
    """What runs inside is no part of what `torch.jit.trace` or a mode of torch records."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        with ExitStack() as modes:
            modes.enter_context(_disable_current_modes())
            for _ in range(torch._C._len_torch_function_stack()):
                modes.enter_context(_pop_mode_temporarily())
            yield
    finally:
        torch._C._set_tracing_state(tracing)


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """What runs inside may not change the attributes or the tensors of a module: this puts the
    attributes back and declines.
    """
    modules = with_originals(module)
    before = [_state_of(m) for m in modules]
    tensors = [*module.parameters(), *module.buffers()]
    versions = [_version_of(t) for t in tensors]
    # Counters are put back too.
    counters = {t: t.clone() for t in module.buffers() if t.dim() == 0 and not t.is_meta}
    try:
        yield
    finally:
        changed = [_put_back(m, state) for m, state in zip(modules, before, strict=True)]
        written = [_version_of(t) for t in tensors] != versions
        if written:
            with torch.no_grad():
                for tensor, value in counters.items():
                    tensor.copy_(value)
    names = [name for name in changed if name is not None]
    if names:
        raise Declined(f"its forward changes the attribute {names[0]}")
    if written:
        raise Declined("its forward changes a parameter or a buffer")


def with_originals(module: nn.Module) -> list[nn.Module]:
    """All modules inside, and the originals whose forwards stand-ins among them run."""
    modules = list(module.modules())
    return modules + [
        m for inner in modules if isinstance(m := vars(inner).get("original"), nn.Module)
    ]


def _version_of(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _state_of(module: nn.Module) -> dict[str, tuple]:
    """The attributes, and what is in those that are lists or dicts."""
    copies = {list: list, dict: dict, set: set}
    return {
        name: (value, copies[type(value)](value) if type(value) in copies else None)
        for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, state: dict[str, tuple]) -> str | None:
    """The name of an attribute that has changed, which is now as it was."""
    own, changed = vars(module), None
    for name in own.keys() - state.keys():
        del own[name]
        changed = name
    for name, (value, content) in state.items():
        if own.get(name, changed) is not value:
            own[name] = value
            changed = name
        if content is not None and not _same_content(value, content):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
            changed = name
    return changed


def _same_content(value, content) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, set):
        return value == content
    if isinstance(value, dict):
        return all(value.get(key, content) is item for key, item in content.items())
    return all(a is b for a, b in zip(value, content, strict=True))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """The flags of all modules inside alone: no `train` or `eval` is called."""
    before = {inner: inner.training for inner in with_originals(module)}
    try:
        for inner in before:
            inner.training = False
        yield
    finally:
        for inner, training in before.items():
            inner.training = training


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode have no counter of batches inside, which a call would move."""
    counts = {
        norm: norm._buffers["num_batches_tracked"]
        for norm in with_originals(module)
        if isinstance(norm, _BatchNorm) and norm.training and "num_batches_tracked" in norm._buffers
    }
    try:
        for norm in counts:
            norm._buffers["num_batches_tracked"] = None
        yield
    finally:
        for norm, count in counts.items():
            norm._buffers["num_batches_tracked"] = count
