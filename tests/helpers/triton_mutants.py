"""The sources of the Triton kernels with a text replaced, for the interpreter."""

import sys
from pathlib import Path

from mnv2_kernels.ops.triton import interpreter

MODULES = ("geometry", "values", "hidden", "patch", "gate", "ends")
FOLDER = Path(interpreter.__file__).parent / "kernels"
SOURCES = {name: (FOLDER / f"{name}.py").read_text() for name in MODULES}
PACKAGE = "mutants_of_mnv2_kernels"


def mutate(old: str, new: str, modules: tuple[str, ...]) -> dict[str, str]:
    """The sources where one of these modules has a text replaced, which they hold once."""
    found = [name for name in modules for _ in range(SOURCES[name].count(old))]
    assert len(found) == 1, f"{len(found)} times in the sources: {old}"
    return SOURCES | {found[0]: SOURCES[found[0]].replace(old, new)}


def interpret(monkeypatch, folder: Path, sources: dict[str, str]) -> None:
    """Makes the interpreter run other sources, which are written to a folder."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    for name in [n for n in sys.modules if n.startswith(PACKAGE)]:
        del sys.modules[name]
    kernels = interpreter.load(folder, PACKAGE)
    monkeypatch.setattr(interpreter, "_kernels", lambda: kernels)
