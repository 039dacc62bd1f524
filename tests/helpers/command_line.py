"""What tests of the command line read, and give it."""

from mnv2_kernels.profiling.variants import variants

EXECUTIONS = ("eager", "folded", "fused", "planned")


def rows_of(text: str) -> list[list[str]]:
    """Cells of the rows of all tables, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def spoil(model):
    """Variants of which the fused one gives another first class."""
    copies = variants(model)
    fused = copies["fused"]
    fused.register_forward_hook(lambda module, args, y: y.roll(1, dims=1))
    return copies
