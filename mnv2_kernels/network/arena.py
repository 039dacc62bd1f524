"""Where the tensors of a network are while it runs: which stream, which overwrite, and where; and
memory that a plan keeps for them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor

from ..ops.extension import missing
from ..ops.extension import module as _C
from . import program
from .program import Block, Layer, Program, Shape, Step

_ALIGNMENT = 16  # elements: 64 bytes


def arrange(named: Sequence[tuple[str, Layer]], shape: Shape) -> tuple[list[Step], int]:
    """The steps of layers with their names, for images of `shape` (C, H, W), and the elements of
    their arena.

    Raises:
        ValueError: images of that shape do not fit the layers.
    """
    steps = [Step(layer) for _, layer in named]
    first = steps[0].layer
    channels = first.config.in_channels if isinstance(first, Block) else first.in_channels
    if shape[0] != channels:
        raise ValueError(f"plan: input_shape must have {channels} channels, got {shape}")
    results = program.shapes(steps, shape)
    for (name, _), result in zip(named, results, strict=True):
        if min(result) < 1:
            raise ValueError(f"plan: input_shape {shape} is too small for {name}")
    row_by_row, takes_rows = _row_by_row(steps, shape)
    sizes = [_aligned(math.prod(result)) for result in results]
    for i in range(len(steps) - 1):
        # Tensors that shrink on the way: from the image to the first small one.
        if row_by_row[i] and takes_rows[i + 1] and sizes[i] > sizes[i + 1]:
            steps[i] = replace(steps[i], streams=True)
    kept = [i for i, step in enumerate(steps[:-1]) if not step.streams]
    in_place = {i for i in kept if _overwrites(steps, results, i, row_by_row[i])}
    # Every step finds its input at one end of the arena and leaves its result at the other, or at
    # the end where its input is.
    arena = max((sizes[i] for i in kept), default=0)
    for before, i in pairwise(kept):
        if i not in in_place:
            arena = max(arena, sizes[before] + sizes[i])
    at_end = True
    for i in kept:
        at_end = at_end if i in in_place else not at_end
        steps[i] = replace(steps[i], offset=arena - sizes[i] if at_end else 0)
    return steps, arena


def _overwrites(steps: Sequence[Step], results: Sequence[Shape], i: int, row_by_row: bool) -> bool:
    """Whether a step can write its result over its input, which is in the arena."""
    layer = steps[i].layer
    if i == 0 or steps[i - 1].streams or not isinstance(layer, Block):
        return False
    if layer.weights.gate is not None:
        # What the gate multiplies is kept elsewhere; a larger result would need more room.
        return math.prod(results[i]) <= math.prod(results[i - 1])
    return row_by_row and layer.config.residual and layer.config.expansion


def _row_by_row(steps: Sequence[Step], shape: Shape) -> tuple[list[bool], list[bool]]:
    """Which steps go through the image once, row by row, so that they can stream, and which can
    follow one that does.
    """
    together = program.encode(steps, shape, 0)
    known = together.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if _C is None or together.device.type != "cpu" or not known:
        return [False] * len(steps), [False] * len(steps)
    apart, offset = [], 0
    for step, result in zip(steps, program.shapes(steps, shape), strict=True):
        apart.append(replace(step, offset=offset))
        offset += _aligned(math.prod(result))
    described = describe(program.encode(apart, shape, offset), 1)
    return described["row_by_row"], described["takes_rows"]


def describe(p: Program, threads: int) -> dict:
    """What the kernels say of a program: `row_by_row`, `takes_rows`, `rows_in_memory` by step, and
    `line_bytes`.
    """
    if _C is None:
        raise RuntimeError(f"plan: {missing}")
    return _C.describe_program(p.integers, p.bounds, str(p.dtype).removeprefix("torch."), threads)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


class OwnedArena:
    """Memory for one call at a time: `nbytes` bytes, held from now on.

    Copies, by `copy.deepcopy` or pickle, get memory of their own.
    """

    def __init__(self, nbytes: int):
        with torch.inference_mode(False):
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._lock = Lock()
        _owned.add(self)

    def __reduce__(self) -> tuple:
        return OwnedArena, (self.nbytes,)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @contextmanager
    def taken(self) -> Iterator[Tensor]:
        """The memory (nbytes,), uint8, once no other thread has it."""
        with self._lock:
            yield self._memory

    def _unlock(self) -> None:
        self._lock = Lock()


_owned: WeakSet[OwnedArena] = WeakSet()


def _unlock_all() -> None:
    """A fork copies the locks that other threads hold, but not those threads."""
    for arena in _owned:
        arena._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_all)
