"""Import this before torchvision, whose compiled operators do not load next to a CPU-only torch."""

from contextlib import suppress

from mnv2_kernels.cli.named_models import import_torchvision

with suppress(ModuleNotFoundError):
    import_torchvision("torchvision")
