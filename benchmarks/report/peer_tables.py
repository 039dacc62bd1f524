"""Tables that compare this package with other runtimes, from rows of `peers`."""

from collections.abc import Iterator, Mapping

from ..harness import Row
from ..markdown import MIB, markdown, percent

RANK = {"default": 0, "neon": 1, "avx2": 1, "avx512": 2}
OURS = {"float32": "planned", "bfloat16": "planned-bf16"}


def peer_tables(results: Mapping[str, list[Row]]) -> dict[str, str]:
    """Markdown by marker name; a name is missing where there are no rows for it."""
    rows = of_best_instruction_set(results["peers"])
    held_back = [marked(row) for row in results["peers"] if row not in rows and "limited" in row]
    held_back = [row for row in held_back if "width" not in row]
    sizes = [row for row in rows if "width" in row]
    rows = [row for row in rows if "width" not in row]
    made = {
        "peers-network": network_table([row for row in rows if "model" in row]),
        "peers-sizes": size_table(sizes),
        "peers-blocks": block_table([row for row in rows if "block" in row]),
        "peers-avx2-network": network_table([row for row in held_back if "model" in row]),
        "peers-avx2-blocks": block_table([row for row in held_back if "block" in row]),
        "peers-memory": memory_table(of_best_instruction_set(results["peers-memory"])),
    }
    return {name: text for name, text in made.items() if text}


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
    """One line a block, batch 1: our time, the time of others over ours, shares of the peak."""
    rows = [row for row in rows if row["threads"] == threads and row["dtype"] == "float32"]
    blocks: dict[int, dict[str, Row]] = {}
    for row in rows:
        blocks.setdefault(row["block"], {})[row["provider"]] = row
    blocks = {number: found for number, found in blocks.items() if OURS["float32"] in found}
    others = dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS["float32"])
    body = []
    for number, found in sorted(blocks.items()):
        ours = found[OURS["float32"]]
        cells = [str(number), ours["config"], f"{ours['seconds']['50%'] * 1e6:.0f}"]
        cells.append(percent(ours["share_of_fma_peak"]))
        body.append(cells + [_beside_ours(found.get(name)) for name in others])
    return markdown(["block", "in x hidden x out", "us, planned", "of FMA peak", *others], body)


def size_table(rows: list[Row], threads: int = 1) -> str:
    """One line a width and resolution, batch 1: our time, that of others over ours, shares."""
    rows = [row for row in rows if row["threads"] == threads and row["dtype"] == "float32"]
    sizes: dict[tuple[float, int], dict[str, Row]] = {}
    for row in rows:
        sizes.setdefault((row["width"], row["resolution"]), {})[row["provider"]] = row
    others = dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS["float32"])
    body = []
    for (width, resolution), found in sorted(sizes.items()):
        if ours := found.get(OURS["float32"]):
            cells = [str(width), f"{resolution}x{resolution}"]
            cells += [f"{ours['seconds']['50%'] * 1e3:.3f}", percent(ours["share_of_fma_peak"])]
            body.append(cells + [_beside_ours(found.get(name)) for name in others])
    return markdown(["width", "input", "ms, planned", "of FMA peak", *others], body)


def _beside_ours(row: Row | None) -> str:
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
