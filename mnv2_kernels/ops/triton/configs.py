"""Which configuration of the patch kernel a block runs with.

A table measured on the GPU at hand comes first, then the one for its architecture, estimated from
machine code, then `fallback`, which knows every shape. No choice depends on the batch, so that an
image gives the same bits in any.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
import triton

from ...block.config import BlockConfig
from . import precision
from .kernels.geometry import slots

# One JSON file a GPU or architecture, written by benchmarks/tune_triton.py.
TABLES = Path(__file__).parent / "configs"

# A program of compute capability 9.0 can have this much shared memory.
SHARED_BYTES = 227 * 1024
# Of the 255 registers of a thread, what `registers` counts may take; the rest is for addresses,
# masks and the operands of products.
_REGISTERS = 160


@dataclass(frozen=True)
class PatchConfig:
    """The constants of `patch.inverted_residual_patch`, and of `gate.depthwise_sums` some of them,
    that change nothing but their rounding.

    `patches` of `patch_h` x `patch_w` output pixels make a tile; `chunk` hidden channels are
    computed at a time. `in_tile` and `out_tile` are the channels in one matrix product: powers of
    two, so that 96 channels are 3 tiles of 32 and not one of 128; a program computes `out_tiles`
    of the latter. `keep_x` holds all of x under a tile in shared memory, read once; without it, x
    is read again for every chunk. `half`: the depthwise is computed in fp16 (fp16 inputs only), and
    only where the clip of the expansion bounds what it sums.
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
    """A configuration and where it comes from."""

    config: PatchConfig
    source: str


def choose(
    block: BlockConfig, dtype: torch.dtype, device: torch.device, width_out: int | None = None
) -> Choice:
    """The configuration for a block on a device; pure but for asking the device what it is.

    `width_out` is the width of the output where it is known: short rows have configurations of
    their own.
    """
    shared_bytes_limit = _shared_bytes_limit(device)
    name = key(block, dtype)
    for table in _table_names(device):
        rows = load(table)
        config = rows.get(f"{name}@{width_out}") or rows.get(name)
        if config is not None and shared_bytes(block, config, dtype) <= shared_bytes_limit:
            return Choice(config, f"table {table}")
    return fallback(block, dtype, width_out, shared_bytes_limit)


def without_half(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same size, whose configurations compute the depthwise in fp32."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def of_sums(block: BlockConfig, dtype: torch.dtype, device: torch.device) -> PatchConfig:
    """The configuration for the part of a block before its gate, by the rules.

    It has no sums of a projection, but takes as many registers as those of 64 channels would. Eight
    warps share them: with four, large blocks spill.
    """
    part, limit = replace(block, out_channels=64), _shared_bytes_limit(device)
    config = fallback(part, without_half(dtype), shared_bytes_limit=limit).config
    return replace(config, num_warps=8)


def key(block: BlockConfig, dtype: torch.dtype) -> str:
    """What a table is looked up by, followed by `@width_out` where a row is for one width."""
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


@cache
def _shared_bytes_limit(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def gpu_name(device: torch.device) -> str:
    """What the table of a GPU is called."""
    return torch.cuda.get_device_name(device).replace(" ", "_")


def fallback(
    block: BlockConfig,
    dtype: torch.dtype,
    width_out: int | None = None,
    shared_bytes_limit: int = SHARED_BYTES,
) -> Choice:
    """A configuration for any block, from its sizes alone; every rule says why."""
    tensor_cores = dtype != torch.float32 or precision(dtype) == "tf32"
    few = block.out_channels <= 32
    # One tile is worth more than no waste; four warps side by side along it need 8 channels each.
    out_tile = triton.next_power_of_2(block.out_channels) if few else _tile(block.out_channels, 32)
    # Products are unrolled: as many tiles as compile in seconds.
    in_tile = next(t for t in (16, 32, 64, 128) if block.in_channels <= 5 * t or t == 128)
    in_tile = max(in_tile, _tile(block.in_channels, 16))
    # The fewest halo pixels expanded twice first; a row without any where it is short enough.
    patches = ((2, 2), (1, 2), (1, 1))
    if width_out == 7 and not few:
        patches = ((1, 7), *patches)
    # Few output channels leave a warp room for all of its sums; many are shared out.
    shapes = ((32, 16, 2), (16, 16, 1)) if few else ((16, 64, 4), (16, 64, 8))
    if not tensor_cores:
        shapes = ((16, 16, 1), (16, 32, 4), (16, 32, 8))
    for (patch_h, patch_w), (count, chunk, num_warps) in product(patches, shapes):
        config = PatchConfig(
            patches=count,
            patch_h=patch_h,
            patch_w=patch_w,
            chunk=chunk,
            in_tile=in_tile,
            out_tile=out_tile,
            out_tiles=-(-block.out_channels // out_tile),
            keep_x=True,
            # Nine products of clipped numbers are near enough to eager's fp16, 25 are not.
            half=dtype == torch.float16 and block.kernel_size == 3 and block.expansion,
            num_warps=num_warps,
        )
        # Without tensor cores, a thread holds the operands of its products too.
        most_registers = _REGISTERS if tensor_cores else _REGISTERS // 3
        fits_shared = shared_bytes(block, config, dtype) <= shared_bytes_limit
        if fits_shared and registers(config) <= most_registers:
            return Choice(config, "rules: the largest patch that fits")
    # Too many channels for one program: x is read again for every chunk, and each group of output
    # channels expands for itself.
    config = replace(
        config,
        patches=16,
        chunk=32,
        in_tile=min(in_tile, 64),
        out_tiles=1,
        keep_x=False,
        num_warps=4,
    )
    while config.out_tiles * out_tile < block.out_channels:
        wider = replace(config, out_tiles=2 * config.out_tiles)
        if registers(wider) > _REGISTERS // 2:
            break
        config = wider
    return Choice(config, "rules: more channels than a program can keep")


def registers(config: PatchConfig) -> float:
    """Registers a thread for what lives across the whole of a chunk: sums and hidden values."""
    pixels, threads = config.patch_h * config.patch_w, 32 * config.num_warps
    sums = pixels * config.patches * config.out_tile * config.out_tiles / threads
    tile = config.patches * config.chunk / threads
    return sums + pixels * tile / (2 if config.half else 1) + 2 * tile


def shared_bytes(block: BlockConfig, config: PatchConfig, dtype: torch.dtype) -> int:
    """An upper bound of a program's shared memory; tests compare it with what is compiled."""
    in_channels = -(-block.in_channels // config.in_tile) * config.in_tile
    rows, columns = (
        slots(patch, block.kernel_size, block.stride, block.dilation)
        for patch in (config.patch_h, config.patch_w)
    )
    kept = config.patches * rows * columns * in_channels if block.expansion and config.keep_x else 0
    # A chunk of both weights, as often as it is loaded ahead, and hidden values between products.
    products = (in_channels if config.keep_x else config.in_tile) if block.expansion else 0
    weights = config.chunk * (products + config.out_tile * config.out_tiles) * config.num_stages
    hidden = 3 * config.patches * config.chunk
    in_loop = (kept + weights + hidden) * dtype.itemsize
    behind_it = config.patches * config.patch_h * config.patch_w * config.out_tile * 4
    return max(in_loop, behind_it) + 1024


def _tile(channels: int, smallest: int) -> int:
    """The largest power of two up to 64 that cuts the channels evenly, rounded to `smallest`."""
    rounded = -(-channels // smallest) * smallest
    return min(64, rounded & -rounded)
