"""Which configuration of the patch kernel a block runs with.

A table measured on the GPU at hand comes first, then the one for its architecture, estimated from
machine code, then `fallback`, which knows every shape. No choice depends on the batch, so that an
image gives the same bits in any.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..block import BlockConfig

# One JSON file a GPU or architecture, written by benchmarks/tune_triton.py.
TABLES = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class PatchConfig:
    """The constants of `patch.inverted_residual_patch` that do not change its result.

    `patches` of `patch_h` x `patch_w` output pixels make a tile; `chunk` hidden channels are
    computed at a time. `in_tile` and `out_tile` are the channels in one matrix product: powers of
    two, so that 96 channels are 3 tiles of 32 and not one of 128; a program computes `out_tiles`
    of the latter. `keep_x` holds all of x under a tile in shared memory, read once; without it, x
    is read again for every chunk. `half`: the depthwise is computed in fp16 (fp16 inputs only).
    """

    patches: int
    patch_h: int
    patch_w: int
    chunk: int
    in_tile: int
    out_tile: int
    out_tiles: int
    keep_x: bool
    half: bool
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from, as `explain` shows it."""

    config: PatchConfig
    source: str


def choose(block: BlockConfig, dtype: torch.dtype, device: torch.device) -> Choice:
    """The configuration for a block on a device; pure but for asking the device its name."""
    for table in _table_names(device):
        config = load(table).get(key(block, dtype))
        if config is not None:
            return Choice(config, f"table {table}")
    return fallback(block, dtype)


def precision(dtype: torch.dtype) -> str:
    """How products of matrices are computed: as IEEE says, or in TF32 where PyTorch allows it."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def key(block: BlockConfig, dtype: torch.dtype) -> str:
    """What a table is looked up by: all that a configuration depends on, and no image size."""
    parts = [block.name if block.expansion else f"t1-{block.name}"]
    if block.dilation != 1:
        parts.append(f"d{block.dilation}")
    parts.append("tf32" if precision(dtype) == "tf32" else str(dtype).removeprefix("torch."))
    return "-".join(parts)


@cache
def load(table: str) -> dict[str, PatchConfig]:
    """A committed table by name; empty where there is none."""
    path = TABLES / f"{table}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["configs"]
    return {name: PatchConfig(**fields) for name, fields in rows.items()}


def table_names() -> list[str]:
    """The committed tables."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


@cache
def _table_names(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return ("sm_90",)
    return gpu_name(device), "sm_90"


def gpu_name(device: torch.device) -> str:
    """What the table of a GPU is called."""
    return torch.cuda.get_device_name(device).replace(" ", "_")


def fallback(block: BlockConfig, dtype: torch.dtype) -> Choice:
    """A configuration for any block, from its sizes alone; every rule says why.

    Rules are for GPUs with 255 registers a thread and 99 KiB of shared memory a program, the least
    of compute capability 8.0 and later.
    """
    itemsize = dtype.itemsize
    in_tile = _tile(block.in_channels, smallest=16, largest=64)
    out_tile = _tile(block.out_channels, smallest=8, largest=64)
    # The largest patch first: it expands the fewest halo pixels again.
    for patch_h, patch_w in ((2, 2), (1, 2), (1, 1)):
        slots = extent(block, patch_h) * extent(block, patch_w)
        # Tensor cores take 16 rows; more patches a tile would share weights, not registers.
        held = 16 * slots * in_tile * -(-block.in_channels // in_tile) * itemsize
        if held <= _SHARED_BYTES:
            break
    keep_x = held <= _SHARED_BYTES
    # fp32 sums of the projection: 64 registers a thread at 4 warps leave room for the depthwise.
    sums = patch_h * patch_w * out_tile
    out_tiles = max(1, min(-(-block.out_channels // out_tile), _SUMS // sums))
    wide = block.out_channels > 32
    config = PatchConfig(
        patches=16,
        patch_h=patch_h,
        patch_w=patch_w,
        # One warp holds 16 channels of every pixel of a patch in registers.
        chunk=64 if wide else 16,
        in_tile=in_tile,
        out_tile=out_tile,
        out_tiles=out_tiles,
        keep_x=keep_x,
        half=dtype == torch.float16 and block.kernel_size == 3,
        num_warps=4 if wide else 1,
    )
    return Choice(config, "rules for any shape")


_SHARED_BYTES = 80 * 1024
_SUMS = 1024


def _tile(channels: int, smallest: int, largest: int) -> int:
    """The largest power of two that cuts the channels, rounded up to `smallest`, without waste."""
    rounded = -(-channels // smallest) * smallest
    return min(largest, rounded & -rounded)


def extent(block: BlockConfig, patch: int) -> int:
    """Rows (or columns) of input under a patch and its halo."""
    return (patch - 1) * block.stride + block.dilation * (block.kernel_size - 1) + 1
