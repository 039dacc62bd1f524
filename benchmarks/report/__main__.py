"""`python -m benchmarks.report`: rows of results -> the tables of the pages, and figures.

The rows are the newest of the machine that ran last; nothing is typed by hand.
"""

import argparse
from pathlib import Path

from matplotlib import rc_context

from ..harness import RESULTS
from ..machine import ROOT
from . import plot
from .cpu_tables import latest
from .gpu_tables import latest_on_gpu
from .pages import pages


def main() -> None:
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=summary)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pages to fill in")
    options = parser.parse_args()
    for path, text in pages(options.results, options.root).items():
        path.write_text(text)
        print(f"wrote {path}")
    results, on_gpu = latest(options.results), latest_on_gpu(options.results)
    with rc_context(plot.STYLE):
        for path in (
            *plot.live_memory(results["memory"], options.results),
            *plot.figures(results, options.results),
            *plot.peer_figures(results, options.results),
            *plot.gpu_figures(on_gpu, options.results),
        ):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
