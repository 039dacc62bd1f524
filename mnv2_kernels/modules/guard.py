"""Whether modules are what they were, and what kind of change there is: one look at all that calls
of fused layers take for granted.
"""

import ctypes
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops import extension

_DICTS = [
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
]
# Attributes that a forward is read by. A property of such a name has a value that no look at
# attributes sees.
_READ = (
    *("training", "backend", "eps", "min_val", "max_val"),
    *("stride", "padding", "dilation", "padding_mode"),
)

# As in csrc/torch/guard.cpp: sequences in sequences, items of one, elements of a tensor.
_DEEPEST, _LONGEST, _SAMPLES = 8, 1000, 8
_PLAIN = {bool, int, float, str, type(None)}
# Of tensors that stand for others, or have more to them than memory.
_FOREIGN = [
    getattr(torch._C.DispatchKey, name)
    for name in (
        *("Python", "Functionalize", "FuncTorchBatched", "FuncTorchGradWrapper"),
        *("Quantized", "NestedTensor"),
    )
]

# Fused optimizers change parameters without counting it in their versions.
_optimizer_steps = 0


def _count_step(optimizer, args, kwargs) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How many steps all optimizers of the process have made."""
    return _optimizer_steps


class Change(Enum):
    """What has changed since the last look; numbered as in csrc/torch/guard.h."""

    SAME = 0
    WEIGHTS = 1  # of tensors: identity, memory, version, requires_grad, values
    STRUCTURE = 2  # anything else


_CHANGES = tuple(Change)


class Guard:
    """Modules as they are now: their classes, attributes, children, hooks and tensors.

    Exactly these modules: none inside them that is not given. Writes that PyTorch does not count
    (through `.data`, NumPy, another process) are seen where they change one of the eight elements
    of a CPU tensor that are compared. `check` may be called by several threads: each change is
    told to one of them.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        watched = list(modules)
        self._steps = optimizer_steps()
        self._look: _CompiledLook | _Look | None = None
        # Why changes of these modules cannot be seen; None where they can.
        self.why_blind: str | None = None
        try:
            for kind in dict.fromkeys(map(type, watched)):
                _check_class(kind)
            self._look = _look_at(watched)
        except _Blind as blind:
            self.why_blind = str(blind)
        # False: changes cannot be seen, and `check` always answers STRUCTURE.
        self.watches = self._look is not None

    def check(self) -> Change:
        """What has changed since the last call, or since the guard was made.

        After WEIGHTS, what is there now counts as known. STRUCTURE is the last answer: a guard that
        gave it gives it again.
        """
        look = self._look
        if look is None:
            return Change.STRUCTURE
        # Before the look: a step that is made meanwhile is seen by the next one.
        steps = optimizer_steps()
        change = look.check()
        if change is Change.STRUCTURE:
            self._look = None
        elif steps != self._steps:
            self._steps = steps
            change = Change.WEIGHTS
        return change

    @property
    def version(self) -> tuple[int, int]:
        """Another value after every answer of WEIGHTS, to whichever thread it was given."""
        look = self._look
        return (-1 if look is None else look.changes()), optimizer_steps()

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor required gradients at the last look."""
        look = self._look
        return look is not None and look.requires_grad()

    def __reduce__(self) -> tuple:
        # A copy would watch other modules than those that its owner's copy has.
        return _gone, ()


def _gone() -> Guard:
    """A guard that has given its last answer."""
    guard = Guard([])
    guard._look, guard.watches = None, False
    return guard


class _Blind(Exception):
    """Why changes cannot be seen."""


def _check_class(kind: type[nn.Module]) -> None:
    if kind.__getattribute__ is not object.__getattribute__:
        raise _Blind(f"{kind.__name__}.__getattribute__ computes attributes")
    for name in _READ:
        # What `getattr` gives may be computed too.
        own = next((vars(c)[name] for c in kind.__mro__ if name in vars(c)), None)
        if hasattr(own, "__get__"):
            raise _Blind(f"{kind.__name__}.{name} is computed by the class")


def _look_at(modules: list[nn.Module]) -> "_CompiledLook | _Look":
    for module in modules:
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise _Blind(f"{type(module).__name__} is not initialised yet")
    if extension.module is None:
        return _Look(modules)
    taken = extension.module.Guard.take(modules, _DICTS)
    if taken is not None:
        return _CompiledLook(modules, *taken)
    _Seen(modules)  # It knows why.
    raise _Blind("changes of these modules cannot be seen")


class _CompiledLook:
    def __init__(self, modules: list[nn.Module], guard, dicts: list, alive: list):
        self._modules, self._guard, self._dicts, self._alive = modules, guard, dicts, alive

    def check(self) -> Change:
        return _CHANGES[self._guard.check(self._modules, self._dicts, self._alive)]

    def requires_grad(self) -> bool:
        return self._guard.requires_grad()

    def changes(self) -> int:
        return self._guard.changes()


class _Look:
    """The same in Python, without the compiled extension."""

    def __init__(self, modules: list[nn.Module]):
        self._modules = modules
        self._known = _Seen(modules)
        self._changes = 0
        self._lock = threading.RLock()  # Letting go of what was known may ask again.

    def check(self) -> Change:
        with self._lock:
            try:
                known, now = self._known, _Seen(self._modules)
            except _Blind:
                return Change.STRUCTURE
            same_tensors = _same(now.tensors, known.tensors) and now.facts == known.facts
            self._changes += not same_tensors
            self._known = now
            if not _same(now.things, known.things) or now.shapes != known.shapes:
                return Change.STRUCTURE
            return Change.SAME if same_tensors else Change.WEIGHTS

    def requires_grad(self) -> bool:
        return self._known.wants_grad

    def changes(self) -> int:
        return self._changes


def _same(now: list, before: list) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


class _Seen:
    """All that one look of the Python twin has seen: csrc/torch/guard.cpp sees the same."""

    def __init__(self, modules: list[nn.Module]):
        self.things: list = []  # compared by identity
        self.shapes: list = []  # compared by value, as are the facts
        self.tensors: list[Tensor] = []
        self.facts: list = []
        self.wants_grad = False
        self._storages: list = []  # so that no other gets their address
        with torch._C.DisableTorchFunction():
            for module in modules:
                self._see_module(module)

    def _see_module(self, module: nn.Module) -> None:
        kind, own = type(module), object.__getattribute__(module, "__dict__")
        self.things += kind, own
        self._see_dict(kind, "__dict__", own)
        for name in _DICTS:
            if name not in own:
                raise _Blind(f"a {kind.__name__} has no {name}")
            self._see_dict(kind, name, own[name])

    def _see_dict(self, owner: type, name: str, content: dict) -> None:
        kind = type(content)
        if not issubclass(kind, dict):
            raise _Blind(f"{name} of a {owner.__name__} is no dict but a {kind.__name__}")
        count = dict.__len__(content)
        self.shapes.append(count)
        if count == 0:
            return
        if kind is not dict and kind is not OrderedDict:
            raise _Blind(f"{name} of a {owner.__name__} is a {kind.__name__}, which may reorder it")
        # Keys of other classes may run Python when they are looked up.
        if kind is OrderedDict and any(type(key) not in (str, int) for key in dict.keys(content)):
            raise _Blind(f"{name} of a {owner.__name__} has keys other than names and numbers")
        for key, value in list(kind.items(content)):
            self.things.append(key)
            if type(value) in _PLAIN:
                self.things.append(value)
            else:
                self._see(value, 0)

    def _see(self, value: object, depth: int) -> None:
        kind = type(value)
        if issubclass(kind, Tensor):
            self.things.append(kind)
            self._see_tensor(value)
            return
        self.things.append(value)
        if not _has_a_list(value):
            return
        # The items that it has, whatever a class of its own says.
        items = list.copy(value) if issubclass(kind, list) else list(tuple.__iter__(value))
        if depth == _DEEPEST or len(items) > _LONGEST:
            raise _Blind(f"a {kind.__name__} among the attributes is too long or too deep")
        self.shapes.append(len(items))
        for item in items:
            self._see(item, depth + 1)

    def _see_tensor(self, tensor: Tensor) -> None:
        kind, keys = type(tensor).__name__, torch._C._dispatch_keys(tensor)
        if tensor.layout is not torch.strided or any(map(keys.has, _FOREIGN)):
            raise _Blind(f"the values of a {kind} do not follow from its memory alone")
        try:
            storage, size = tensor.untyped_storage(), tensor.element_size()
        except NotImplementedError as error:
            raise _Blind(f"a {kind} has no memory of its own") from error
        memory, first = torch._C._data_address(tensor), tensor.storage_offset() * size
        shape, stride = tensor.shape, tensor.stride()
        samples = _samples(shape, stride, size) if tensor.is_cpu else []
        too_short = samples and first + samples[-1] + size > storage.nbytes()
        if too_short or (memory == 0 and tensor.numel() > 0 and not tensor.is_meta):
            raise _Blind(f"a {kind} has less memory than its shape says")
        self.shapes += keys.raw_repr(), tensor.device, tensor.dtype, shape, stride
        self.tensors.append(tensor)
        self._storages.append(storage)
        self.wants_grad |= tensor.requires_grad
        # Inference tensors count no versions.
        version = 0 if tensor.is_inference() else tensor._version
        self.facts += storage._cdata, memory + first, storage.nbytes(), version
        self.facts.append(tensor.requires_grad)
        self.facts += [ctypes.string_at(memory + first + at, size) for at in samples]


@lru_cache(maxsize=1024)
def _samples(sizes: tuple[int, ...], strides: tuple[int, ...], bytes_of_one: int) -> list[int]:
    """Bytes from the first element to some from the first to the last in memory.

    Elements that share memory count as one.
    """
    # From the last dimension to the first.
    extents = [(size if step else 1, step) for size, step in zip(sizes, strides, strict=True)]
    extents.reverse()
    count = math.prod(size for size, _ in extents) if math.prod(sizes) else 0
    gaps = min(count, _SAMPLES) - 1
    found = []
    for k in range(gaps + 1):
        index, offset = k * (count - 1) // max(gaps, 1), 0
        for size, step in extents:
            offset += index % size * step
            index //= size
        found.append(offset * bytes_of_one)
    return found


def _has_a_list(value: object, depth: int = 0) -> bool:
    """Whether items may change while the sequence stays: items of a list, or of a tuple with a list
    inside.
    """
    kind = type(value)
    if depth == _DEEPEST or not issubclass(kind, tuple):
        return depth == _DEEPEST or issubclass(kind, list)
    return any(_has_a_list(item, depth + 1) for item in tuple.__iter__(value))
