"""The NEON kernel against float64: cross-compiled and emulated where there is no Arm machine.

cpu_alone/driver.cpp runs the kernels of csrc/cpu without torch, in memory between pages that cannot
be touched. Needs `apt-get install g++-aarch64-linux-gnu qemu-user`, or an aarch64 machine with g++.
"""

import platform
import shutil

import cpu_driver
import pytest

ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILER = "g++" if ON_ARM else "aarch64-linux-gnu-g++"
EMULATOR = [] if ON_ARM else ["qemu-aarch64"]
MISSING = [tool for tool in (COMPILER, *EMULATOR) if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
    pytest.mark.timeout(600),
]


def run(what: str) -> cpu_driver.Outcome:
    flags = ("-O3", "-Werror", "-static")
    driver = cpu_driver.build(["neon"], flags, compiler=COMPILER)
    return cpu_driver.run([*EMULATOR, driver], "neon", what)


def counts(outcome: cpu_driver.Outcome) -> dict[str, int]:
    assert not outcome.found, (outcome.printed[-500:], outcome.errors)
    assert outcome.printed.splitlines()[-1].startswith("neon: ")
    return outcome.counts


def test_blocks():
    found = counts(run("blocks"))
    assert found["calls"] >= 1500 and found["low"] >= 1000 and found["high"] >= 1000
    assert found["chunks"] >= 100 and found["groups"] >= 2 and found["strips"] >= 1
    assert found["dense"] >= 50


def test_networks():
    found = counts(run("networks"))
    assert found["calls"] == 60 and found["streams"] >= 40 and found["in-place"] >= 20


def test_gradients():
    found = counts(run("backward"))
    assert found["calls"] >= 250 and found["chunks"] >= 4 and found["strips"] >= 4


def test_the_pages_around_memory_catch():
    outcome = run("overrun")
    assert outcome.printed == "one number more\n" and outcome.found == {"SIGSEGV"}
