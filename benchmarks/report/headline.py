"""The first figures of README.md, from the rows of the tables that they link to."""

from collections.abc import Mapping

from ..harness import Row
from ..markdown import MIB
from .peer_tables import is_of_network, of_best_instruction_set

RUNTIMES = {"litert": "LiteRT", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2"}
OURS = ("folded", "fused", "planned")
PYTORCH = {
    "eager": "as written",
    "folded": "with batch norm folded into the convolutions",
    "compiled": "with `torch.compile`",
}


def headline(results: Mapping[str, list[Row]]) -> str:
    """Time and memory of the network, one image on one thread; empty without rows for them."""
    times = {
        row["provider"]: row
        for row in of_best_instruction_set(results["peers"])
        if is_of_network(row) and row["threads"] == row["batch"] == 1
    }
    peaks = {row["provider"]: row for row in results["memory"] if row["batch"] == 1}
    if not (times.keys() & peaks.keys()).issuperset(OURS):
        return ""
    fused, planned = (_ms(times[name]) for name in OURS[1:])
    pytorch = (f"{_ms(times[name])} {how}" for name, how in PYTORCH.items() if name in times)
    of_plain, of_fused, of_plan = (f"{peaks[name]['peak_bytes'] / MIB:.2f} MiB" for name in OURS)
    others = (
        f"{display} {_ms(times[name])}" for name, display in RUNTIMES.items() if name in times
    )
    row = times["planned"]
    isa = INSTRUCTION_SETS.get(row["instruction_set"], row["instruction_set"])
    size = f"{row['resolution']}x{row['resolution']}"
    lines = [
        f"MobileNetV2, one {size} image, {row['dtype']}, one core of {_cpu(row)} ({isa}):",
        "",
        f"- **Time**: {fused} with `mk.fuse`, {planned} with `mk.plan`.",
        f"- **PyTorch, channels_last**: {', '.join(pytorch)}.",
        f"- **Peak memory of activations**: {of_plain} in PyTorch, {of_fused} with `mk.fuse`,"
        f" {of_plan} with `mk.plan`.",
        f"- **Other runtimes, same core**: {', '.join(others)}.",
        *_of_training(results.get("training", [])),
        "",
        "[More figures, each with its machine and commit](docs/performance.md).",
    ]
    return "\n".join(lines)


def _of_training(rows: list[Row]) -> list[str]:
    """One line: a step with the statistics of the batch, 8 images on one thread."""
    steps = {
        row["provider"]: row
        for row in rows
        if row.get("norms") == "batch" and row["batch"] == 8 and row["threads"] == 1
    }
    if not steps.keys() >= {"fused", "eager"}:
        return []
    fused, eager = (
        f"{steps[name]['seconds']['50%'] * 1e3:.0f} ms and"
        f" {steps[name]['peak_bytes'] / MIB:.0f} MiB"
        for name in ("fused", "eager")
    )
    return [
        f"- **A training step**, 8 images, one core of {_cpu(steps['fused'])}: {fused} with"
        f" `mk.fuse`, {eager} in PyTorch."
    ]


def _cpu(row: Row) -> str:
    cpu = row["cpu"].partition(" (")[0].replace("(R)", "").removesuffix(" Processor")
    return f"{'an' if cpu[0] in 'AEIOU' else 'a'} {cpu}"


def _ms(row: Row) -> str:
    return f"{row['seconds']['50%'] * 1e3:.2f} ms"
