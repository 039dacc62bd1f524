"""Tables that compare this package with other runtimes, from rows of `peers`."""

from collections.abc import Callable, Iterator, Mapping

from ..harness import Row
from ..markdown import MIB, markdown, percent
from .section import Section

RANK = {"default": 0, "neon": 1, "avx2": 1, "avx512": 2}
OURS = {"float32": "planned", "bfloat16": "planned-bf16"}


OF_FLOAT32_PEAK = (
    "A bfloat16 instruction does two multiply-adds where a float32 one does one, so a share of the"
    " float32 peak can be above 100 % in bfloat16."
)
_OVER_PLAN = (
    "in brackets: time relative to `planned` in the same run, share of the float32 multiply-add"
    " peak"
)


def peer_sections(results: Mapping[str, list[Row]]) -> dict[str, Section]:
    """What compares with other runtimes, by marker name; empty where there are no rows for it."""
    rows = of_best_instruction_set(results["peers"])
    held_back = [marked(row) for row in results["peers"] if row not in rows and "limited" in row]
    network = [row for row in rows if is_of_network(row)]
    sizes = [row for row in rows if "width" in row]
    relatives = [row for row in rows if is_of_relative(row) and row["dtype"] == "float32"]
    blocks = [row for row in rows if "block" in row and row["dtype"] == "float32"]
    avx2_network = [row for row in held_back if is_of_network(row)]
    avx2_blocks = [row for row in held_back if "block" in row]
    memory = of_best_instruction_set(results["peers-memory"])
    only_avx2 = (
        "All were told by their own switches to keep to AVX2, and the peak is the one of AVX2."
        " \\*: it used AVX-512 all the same."
    )
    return {
        "peers-network": Section(
            "The network, with other runtimes",
            "torchvision's MobileNetV2 at 224x224. Milliseconds an image, lower is better;"
            f" {_OVER_PLAN}. bfloat16 is relative to `planned-bf16`, and `planned-bf16` to"
            " `planned`."
            f" {OF_FLOAT32_PEAK}",
            network_table(network),
            network,
        ),
        "peers-relatives": Section(
            "Relatives of MobileNetV2, with other runtimes",
            "Networks of torchvision and timm at 224x224, float32. Other runtimes: time relative"
            " to `planned` in the same run, and in brackets the share of the float32 multiply-add"
            " peak.",
            relatives_table(relatives),
            relatives,
        ),
        "peers-sizes": Section(
            "Other widths and resolutions, with other runtimes",
            "MobileNetV2 of this package, one thread, one image. Other runtimes: time relative to"
            " `planned` in the same run, and in brackets the share of the float32 multiply-add"
            " peak.",
            size_table(sizes),
            sizes,
        ),
        "peers-blocks": Section(
            "The 17 blocks, with other runtimes",
            "Each block as a network of its own, one thread, one image. Other runtimes: time"
            " relative to `planned` in the same run, and in brackets the share of the peak.",
            block_table(blocks),
            blocks,
        ),
        "peers-avx2-network": Section(
            "The network on AVX2, with other runtimes",
            f"{only_avx2} Milliseconds an image; {_OVER_PLAN}.",
            network_table(avx2_network),
            avx2_network,
        ),
        "peers-avx2-blocks": Section(
            "The 17 blocks on AVX2, with other runtimes",
            f"{only_avx2} Columns as above.",
            block_table(avx2_blocks),
            avx2_blocks,
        ),
        "peers-memory": Section(
            "Memory of a process, with other runtimes",
            "MiB that a fresh process grows by when it loads the network (weights and input"
            " included), and then at the peak of its first runs; one thread.",
            memory_table(memory),
            memory,
            {"peers_memory.svg": "MiB that a process grows by, runtime by runtime"},
        ),
    }


def is_of_network(row: Row) -> bool:
    """Whether the row is of torchvision's MobileNetV2, not of a block or of another width."""
    return row.get("model", "").endswith(" mobilenet_v2") and "width" not in row


def is_of_relative(row: Row) -> bool:
    """Whether the row is of another network than MobileNetV2."""
    return not row.get("model", " mobilenet_v2").endswith(" mobilenet_v2")


def of_best_instruction_set(rows: list[Row]) -> list[Row]:
    """The rows in which this package ran on the best one; few of the others can be held back."""
    best = max((RANK[row["instruction_set"]] for row in rows), default=None)
    return [row for row in rows if RANK[row["instruction_set"]] == best]


def marked(row: Row) -> Row:
    """The row of a run that asked for AVX2, with a star at the name of who did not keep to it."""
    return row if row["limited"] else {**row, "provider": row["provider"] + " \\*"}


def network_table(rows: list[Row]) -> str:
    """One line a provider; by run ms an image, the time over ours and the share of the peak."""
    runs = sorted({(row["threads"], row["batch"]) for row in rows})
    body = []
    for (provider, dtype), found in by_provider(rows).items():
        by_run = {(row["threads"], row["batch"]): row for row in found}
        cells = [provider, dtype]
        for run in runs:
            row = by_run.get(run)
            cells.append("-" if row is None else _time(row))
        body.append(cells)
    plural = {1: "thread", 2: "threads"}
    heads = [f"{t} {plural.get(t, 'threads')}, batch {b}" for t, b in runs]
    return markdown(["provider", "dtype", *heads], body)


def _time(row: Row) -> str:
    text = f"{row['seconds']['50%'] * 1e3 / row['batch']:.2f}"
    ratio = over_ours(row)
    details = [] if ratio is None else [f"{ratio:.2f}x"]
    if row["share_of_fma_peak"] is not None:
        details.append(percent(row["share_of_fma_peak"]))
    return f"{text} ({', '.join(details)})" if details else text


def over_ours(row: Row) -> float | None:
    """The row's time over our plan's in the same rounds; in float32 where we have no other."""
    names = (OURS[row["dtype"]], OURS["float32"])
    speedups = (row["speedup"].get(name) for name in names)
    return next((1 / speedup for speedup in speedups if speedup), None)


def by_provider(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by provider and dtype, in order of appearance, float32 first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["dtype"] != "float32"):
        found.setdefault((row["provider"], row["dtype"]), []).append(row)
    return found


def block_table(rows: list[Row], threads: int = 1) -> str:
    """One line a block, batch 1."""
    rows = [row for row in rows if row["threads"] == threads]
    columns = {"block": "block", "config": "in x hidden x out"}
    return _beside_ours(rows, columns, "us, planned", lambda ms: f"{ms * 1e3:.0f}")


def size_table(rows: list[Row], threads: int = 1) -> str:
    """One line a width and resolution, batch 1."""
    rows = [row for row in rows if row["threads"] == threads and row["dtype"] == "float32"]
    columns = {"width": "width", "resolution": "input"}
    return _beside_ours(rows, columns, "ms, planned", lambda ms: f"{ms:.3f}")


def relatives_table(rows: list[Row]) -> str:
    """One line a network, batch and number of threads."""
    columns = {"model": "network", "batch": "batch", "threads": "threads"}
    return _beside_ours(rows, columns, "ms an image, planned", lambda ms: f"{ms:.2f}")


def _beside_ours(
    rows: list[Row], columns: Mapping[str, str], head: str, shown: Callable[[float], str]
) -> str:
    """A line for all rows with the same `columns`: our time, that of others over it, shares."""
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row[field] for field in columns), {})[row["provider"]] = row
    others = dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS["float32"])
    body = []
    for key, found in sorted(lines.items()):
        if ours := found.get(OURS["float32"]):
            named = zip(columns, key, strict=True)
            cells = [f"{value}x{value}" if f == "resolution" else str(value) for f, value in named]
            cells.append(shown(ours["seconds"]["50%"] * 1e3 / ours["batch"]))
            cells.append(percent(ours["share_of_fma_peak"]))
            body.append(cells + [_compared(found.get(name)) for name in others])
    return markdown([*columns.values(), head, "of FMA peak", *others], body)


def _compared(row: Row | None) -> str:
    """The row's time over ours, and its share of the peak."""
    ratio = None if row is None else over_ours(row)
    return "-" if ratio is None else f"{ratio:.2f}x ({percent(row['share_of_fma_peak'])})"


def memory_table(rows: list[Row]) -> str:
    """One line a provider: what a load and the first runs add, and what a further image does."""
    body = []
    for (provider, dtype), found in by_provider(rows).items():
        by_batch = {row["batch"]: row for row in found}
        if 1 not in by_batch:
            continue
        cells = [provider, dtype]
        for batch in (1, 8):
            row = by_batch.get(batch)
            for field in ("load_bytes", "run_bytes"):
                cells.append("-" if row is None else f"{row[field] / MIB:.1f}")
        cells.append(
            f"{(total(by_batch[8]) - total(by_batch[1])) / 7 / MIB:.2f}" if 8 in by_batch else "-"
        )
        body.append(cells)
    head = ["provider", "dtype", "batch 1: load", "runs", "batch 8: load", "runs"]
    return markdown([*head, "MiB for every further image"], body)


def total(row: Row) -> int:
    """Bytes that a process has grown by when it has loaded and run."""
    return row["load_bytes"] + row["run_bytes"]


def memory_bars(rows: list[Row]) -> Iterator[tuple[str, dict[int, float]]]:
    """(provider, MiB by batch) of all that has been measured at batch 1 and 8."""
    for (provider, _), found in by_provider(of_best_instruction_set(rows)).items():
        sizes = {row["batch"]: total(row) / MIB for row in found}
        if {1, 8} <= sizes.keys():
            yield provider, sizes
