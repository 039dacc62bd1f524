"""`python -m benchmarks.peers`: this package compared with every other runtime installed here."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import harness
from .cases import DEFAULT, select
from .conversion import CACHE
from .limits import LIMITS, limited
from .registry import PEERS
from .run import Outcome, Settings, run

OURS = ("planned", "fused")


def main() -> int:
    """Exit status: 0 done, 1 a peer failed or was wrong, 2 nothing could be run."""
    options = _parser().parse_args()
    # A run takes long, and is watched in files.
    sys.stdout.reconfigure(line_buffering=True)
    unknown = [name for name in options.only or () if name not in PEERS]
    try:
        if unknown:
            raise ValueError(f"--only must name some of {', '.join(PEERS)}, got {unknown[0]}")
        cases = select(options.cases, options.threads)
    except ValueError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    wanted = [PEERS[name] for name in options.only or PEERS]
    with limited(options.isa):
        reasons = {peer.name: peer.why_not() for peer in wanted}
    peers = [peer for peer in wanted if reasons[peer.name] is None]
    for name, reason in reasons.items():
        print(f"{name}: {'runs' if reason is None else reason}")
    if options.list:
        print(*cases, sep="\n")
        return 0
    if not peers:
        print("peers: none of them can run here", file=sys.stderr)
        return 2
    failed = False
    console = Console() if sys.stdout.isatty() else Console(width=120)
    settings = Settings(
        options.rounds, options.seconds, options.tolerance, options.cache, options.isa
    )
    for outcome in run(cases, peers, settings):
        harness.append(outcome.rows, options.results)
        console.print(table(outcome))
        for name, sentence in outcome.failures.items():
            print(f"{name}: {sentence}")
        failed |= bool(outcome.failures)
    return int(failed)


def table(outcome: Outcome) -> Table:
    """One case: fastest first."""
    rows = sorted(outcome.rows, key=lambda row: row["seconds"]["50%"])
    names = [row["provider"] for row in rows]
    ours = next((name for name in OURS if name in names), None)
    found = Table(title=str(outcome.case))
    for heading in ("provider", "dtype", "ms", "quartiles", "GFLOP/s", "of peak"):
        justify = "left" if heading in ("provider", "dtype") else "right"
        found.add_column(heading, justify=justify, no_wrap=True)
    if ours is not None:
        found.add_column(f"over {ours}'s", justify="right")
    if any("limited" in row for row in rows):
        found.add_column("kept to it", justify="right")
    found.add_column("turns", justify="right")
    found.add_column("error", justify="right")
    for row in rows:
        lower, middle, upper = (1e3 * row["seconds"][q] for q in ("25%", "50%", "75%"))
        share = row["share_of_fma_peak"]
        cells = [row["provider"], row["dtype"], f"{middle:.3f}", f"{lower:.3f} - {upper:.3f}"]
        cells += [f"{row['gflops']:.1f}", "-" if share is None else f"{share:.0%}"]
        if ours is not None:
            cells.append(_over(ours, row, rows))
        if any("limited" in row for row in rows):
            cells.append({True: "yes", False: "no", None: "-"}[row.get("limited")])
        cells += [f"{row['rounds']}/{row['rounds'] + row['dropped']}", f"{row['error']:.0e}"]
        found.add_row(*cells)
    return found


def _over(ours: str, row: harness.Row, rows: list[harness.Row]) -> str:
    if row["provider"] == ours:
        return "1"
    ratio = next(r for r in rows if r["provider"] == ours)["speedup"][row["provider"]]
    return "-" if ratio is None else f"{ratio:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=DEFAULT,
        metavar="PATTERN",
        help="net_b1/t1, 'block*/t2', 'size_*_96_b1/t1', 'efficientnet_b0_*' ...; by default net"
        " and blocks",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="providers; all by default")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="1 and 2 by default")
    parser.add_argument(
        "--isa",
        choices=LIMITS,
        help="ask all of them to keep to this instruction set, and see which of them do",
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each that count")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn")
    parser.add_argument("--list", action="store_true", help="what would be run, and stop")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="of a turn that may be lost to other processes and machines; above it, the turn does"
        " not count",
    )
    parser.add_argument(
        "--results", type=Path, default=harness.RESULTS, help="folder that rows are added to"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of converted models")
    return parser


if __name__ == "__main__":
    sys.exit(main())
