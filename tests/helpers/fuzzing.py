"""How long random tests search, where from, and where what they find is kept.

In `make test` a search is the same every time. In the long form (MNV2_LONG=1) each part of it has a
seed that no run had before, printed and written to build/fuzz/seeds.txt; hypothesis keeps the
shortest form of every failure in build/fuzz/failures and tries it first in the next long run. To
repeat a run: MNV2_LONG=1 MNV2_FUZZ_SEED=<the seed> python -m pytest <the test>. Failures ever found
are `@example`s of their tests, whatever the form.
"""

import math
import os
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from cases import LONG, Expected
from hypothesis import HealthCheck, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

_KEPT = Path(__file__).resolve().parents[2] / "build" / "fuzz"


def searched(short: int, long: int) -> Callable:
    """Settings of a search: how many examples one part has, in the short and in the long form."""
    return settings(
        max_examples=long if LONG else short,
        derandomize=not LONG,
        database=DirectoryBasedExampleDatabase(_KEPT / "failures") if LONG else None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


def in_parts(count: int) -> Callable:
    """Gives a test its `part`: the long form has `count` of them, each with a seed of its own."""
    return pytest.mark.parametrize("part", range(count if LONG else 1))


def at_least(count: int) -> int:
    """What a search has to have covered: nothing in a part of the long form, whose luck it is what
    it comes by.
    """
    return 0 if LONG else count


def of_few(expected: Expected) -> Expected:
    """Wider where there are few errors: the largest error of PyTorch's layers is then small by
    luck, and the mean says no more than the largest.
    """
    if expected.truth.numel() >= 100:
        return expected
    return replace(expected, eager_max=4 * expected.eager_max, eager_mean=math.inf)


def search(check: Callable, part: int, *arguments) -> Counter:
    """Run a search, `check(covered, *arguments, **drawn)`; what it has counted in `covered`.

    `check` has `given` and `searched` around it and adds to `covered["cases"]` itself.
    """
    covered: Counter = Counter()
    if LONG:
        number = int(os.environ.get("MNV2_FUZZ_SEED") or secrets.randbits(32)) + part
        name = f"{check.__module__}::{check.__name__}"
        line = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {name} part {part}: seed"
        print(f"{line} {number}, again by MNV2_FUZZ_SEED={number - part}")
        _KEPT.mkdir(parents=True, exist_ok=True)
        with open(_KEPT / "seeds.txt", "a") as kept:
            kept.write(f"{line} {number}, again by MNV2_FUZZ_SEED={number - part}\n")
        # The decorator marks the function itself, which another part marks again.
        check = seed(number)(check)
    check(covered, *arguments)
    return covered
