"""`python -m benchmarks.report`: rows of results -> tables in README.md, and figures.

It replaces the lines between `<!-- begin:NAME -->` and `<!-- end:NAME -->` for every name that has
a table. The rows are the newest of the machine that ran last; nothing is typed by hand.
"""

import argparse
from pathlib import Path

from ..harness import RESULTS
from ..machine import ROOT
from ..markdown import fill
from . import plot
from .cpu_tables import latest, tables
from .gpu_tables import gpu_tables, latest_on_gpu


def main() -> None:
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=summary)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to fill in")
    options = parser.parse_args()
    results = latest(options.results)
    text = options.readme.read_text()
    on_gpu = latest_on_gpu(options.results)
    options.readme.write_text(fill(text, tables(results) | gpu_tables(on_gpu)))
    written = [
        *plot.figures(results, options.results),
        *plot.peer_figures(results, options.results),
        *plot.gpu_figures(on_gpu, options.results),
    ]
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
