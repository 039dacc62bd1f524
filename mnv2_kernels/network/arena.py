"""Where the tensors of a network are while it runs: which stream, which overwrite, and where; and
memory that a plan keeps for them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import NamedTuple
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
    rows = _rows(steps, shape)
    sizes = [_aligned(math.prod(result)) for result in results]
    for i in range(len(steps) - 1):
        # Tensors that shrink on the way: from the image to the first small one.
        if rows.row_by_row[i] and rows.takes_rows[i + 1] and sizes[i] > sizes[i + 1]:
            steps[i] = replace(steps[i], streams=True)
    in_place = [_overwrites(steps, results, i, rows.row_by_row[i]) for i in range(len(steps))]
    return _placed(steps, sizes, [_aligned(kept) for kept in rows.kept], in_place)


def _placed(
    steps: Sequence[Step], sizes: Sequence[int], kept: Sequence[int], in_place: Sequence[bool]
) -> tuple[list[Step], int]:
    """The steps with their places, and the elements of the arena.

    Every step finds its input at one end of the arena and leaves its result at the other, or at the
    end where its input is. What it keeps is between them, or at the end that is free.
    """
    inputs, before = [], 0
    for i, step in enumerate(steps):
        inputs.append(before)
        if not step.streams:
            before = sizes[i]
    # The last result is not in the arena.
    in_arena = [*sizes[:-1], 0]
    held = [
        kept[i] + (max(inputs[i], in_arena[i]) if in_place[i] else inputs[i] + in_arena[i])
        for i, step in enumerate(steps)
        if not step.streams
    ]
    arena, placed, at_end = max(held), list(steps), True
    for i, step in enumerate(steps):
        if step.streams:
            continue
        input_at_end = at_end
        at_end = at_end if in_place[i] else not at_end
        offset = arena - in_arena[i] if at_end else 0
        first = inputs[i] if not input_at_end else 0
        if not at_end:
            first = max(first, in_arena[i])
        placed[i] = replace(step, offset=offset, kept=first if kept[i] else 0)
    placed[-1] = replace(placed[-1], offset=0)
    return placed, arena


def _overwrites(steps: Sequence[Step], results: Sequence[Shape], i: int, row_by_row: bool) -> bool:
    """Whether a step can write its result over its input, which is in the arena."""
    layer = steps[i].layer
    is_inside = 0 < i < len(steps) - 1 and not steps[i].streams and not steps[i - 1].streams
    if not is_inside or not isinstance(layer, Block):
        return False
    if layer.weights.gate is not None:
        # Its input is not read any more. A larger result would need more room.
        return math.prod(results[i]) <= math.prod(results[i - 1])
    return row_by_row and layer.config.residual and layer.config.expansion


class _Rows(NamedTuple):
    """By step: whether it goes through the image once, row by row, so that it can stream; whether
    it can follow one that does; and the elements that it keeps besides its input and its result.
    """

    row_by_row: list[bool]
    takes_rows: list[bool]
    kept: list[int]


def _rows(steps: Sequence[Step], shape: Shape) -> _Rows:
    unplaced = program.encode(steps, shape, 0)
    known = unplaced.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if _C is None or unplaced.device.type != "cpu" or not known:
        none = [False] * len(steps)
        return _Rows(none, none, [0] * len(steps))
    described = describe(unplaced, 1)
    return _Rows(*(described[name] for name in _Rows._fields))


def describe(p: Program, threads: int) -> dict:
    """What the kernels say of a program, whose steps need no places yet: `row_by_row`,
    `takes_rows`, `kept` and `rows_in_memory` by step, and `line_bytes`.
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
