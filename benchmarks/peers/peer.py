"""What a peer is: one more way to run the same model, which may not be installed here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class Loaded:
    """A model ready to run on one input, which it holds in the layout that suits it best.

    run: one inference, and all that is timed. output: what the last run gave, float32
    (N, C, H, W) or (N, classes). holds: memory that the runtime reads without owning it.
    """

    run: Callable[[], object]
    output: Callable[[], Tensor]
    holds: object = None


def _nothing() -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One runtime with its settings; `load(source, x, threads)` makes it ready.

    `source` is the folder that `convert(model, x, folder)` has filled, or the model where there is
    no conversion. The model is in evaluation mode, float32, channels_last, its batch norm folded;
    `as_written` takes it unfolded. x (N, C, H, W) is float32 and channels_last.

    packages: distributions that must be installed, for converting too. modules: that `load`
    imports. precision: dtype of the arithmetic. needs: says what else is missing. compiles:
    converted to machine code, anew for every number of threads and instruction set.
    """

    name: str
    load: Callable[[nn.Module | Path, Tensor, int], Loaded]
    convert: Callable[[nn.Module, Tensor, Path], None] | None = None
    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    precision: str = "float32"
    needs: Callable[[], str | None] = _nothing
    as_written: bool = False
    compiles: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run here, a sentence; None where it can."""
        missing = [name for name in self.packages if installed(name) is None]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            return f"{' and '.join(missing)} {verb} not installed: pip install .[peers]"
        return self.needs()

    def versions(self) -> dict[str, str]:
        """Of the distributions that it needs."""
        return {name: installed(name) for name in self.packages}


def installed(distribution: str) -> str | None:
    """The version that is installed, None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def of_module(model: nn.Module, x: Tensor) -> Loaded:
    """A module, or anything that is called as one."""
    results: list[Tensor] = []

    def run() -> None:
        # A caller lets go of a result before it asks for the next one.
        results.clear()
        results.append(model(x))

    return Loaded(run, lambda: results[-1].float())
