"""The pages with generated parts, as they should be: figures, tables, and the API."""

from pathlib import Path

from ..harness import RESULTS
from ..machine import ROOT
from ..markdown import fill
from .api import api_page
from .cpu_tables import latest, sections
from .gpu_tables import gpu_sections, latest_on_gpu
from .headline import headline


def pages(results: Path = RESULTS, root: Path = ROOT) -> dict[Path, str]:
    """Path -> text. Between `<!-- begin:NAME -->` and its end is what the rows say of NAME now."""
    rows = latest(results)
    made = sections(rows) | gpu_sections(latest_on_gpu(results))
    contents = {name: str(section) for name, section in made.items()}
    contents["headline"] = headline(rows)
    docs = root / "docs"
    filled = (root / "README.md", docs / "performance.md", docs / "gpu.md")
    return {
        **{path: fill(path.read_text(), contents) for path in filled},
        docs / "api.md": api_page(),
    }
