"""The command line: `mnv2 info | demo | verify | bench | memory | classify IMAGE`.

Exit status: 0 done, 1 a result is wrong, 2 it could not be done (one sentence on stderr).
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from .. import __version__
from ..modules.mobilenet_v2 import mobilenet_v2
from ..ops.backends import backends
from ..ops.extension import module as _C
from ..optional import MissingPackage
from ..profiling import verify as verification
from ..profiling.timing import num_threads
from ..profiling.variants import plain, variants
from .classify import classify
from .console import CannotRun, console
from .demo import demonstrate, performance
from .memory import memory
from .named_models import UnknownModel
from .pretrained import WrongWeights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, sys.argv's by default. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (CannotRun, MissingPackage, UnknownModel, WrongWeights, OSError) as error:
        print(f"mnv2 {options.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def info(options: argparse.Namespace) -> int:
    """What runs here, and what it was built from."""
    rows = {
        "mnv2_kernels": f"{__version__} in {Path(__file__).parents[1]}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        **{f"cuda {i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())},
        **{f"backend {name}": text for name, text in backends().items()},
        **{f"build {name}": value for name, value in (_C.build_info() if _C else {}).items()},
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    return 0


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def demo(options: argparse.Namespace) -> int:
    """Trained networks, plain against fused: answers, speed, memory and a figure."""
    if not (options.output.is_dir() and os.access(options.output, os.W_OK)):
        raise CannotRun(f"--output must be a folder that can be written to, got {options.output}")
    return demonstrate(console(), options.output, rounds=options.rounds)


def verify(options: argparse.Namespace) -> int:
    """Every kernel that runs here against the float64 reference; 1 on a mismatch."""
    checks = [("cpu", torch.float32)]
    if torch.cuda.device_count():
        checks += [("cuda", d) for d in (torch.float16, torch.bfloat16, torch.float32)]
    found = {check: verification.kernels(*check) for check in checks}
    if not any(running for running, _ in found.values()):
        reasons = "; ".join(dict.fromkeys(r for _, reasons in found.values() for r in reasons))
        raise CannotRun(f"no kernel runs here: {reasons}")
    table = Table(
        caption="largest distance from the float64 reference, of the kernel and of PyTorch"
    )
    for heading in ("block", "input", "dtype", "backend", "kernel", "PyTorch", ""):
        table.add_column(heading)
    wrong = 0
    for check, (running, _) in found.items():
        for result in verification.verify(running, *check):
            wrong += result.wrong is not None
            table.add_row(
                result.block,
                "x".join(map(str, result.shape)),
                result.dtype,
                result.backend,
                f"{result.error:.1e}",
                f"{result.plain_error:.1e}",
                result.wrong or "ok",
            )
    console().print(table)
    print(f"{table.row_count - wrong} of {table.row_count} right")
    return 1 if wrong else 0


def bench(options: argparse.Namespace) -> int:
    """MobileNetV2 plain, folded and fused, timed in turns; or with other runtimes."""
    if options.peers is not None:
        return _bench_peers(options.peers)
    size = options.resolution
    model = mobilenet_v2(options.width).eval()
    x = torch.randn(options.batch, 3, size, size)
    with torch.inference_mode(), num_threads(options.threads):
        copies = variants(model)
        truth = plain(model).double()(x.double())
        wrong = verification.why_wrong(copies["fused"](x), copies["folded"](x), truth)
        if wrong:
            print(f"mnv2 bench: the fused network is wrong, not timed: {wrong}", file=sys.stderr)
            return 1
        title = f"MobileNetV2 {options.width}"
        console().print(performance(title, copies, x, options.rounds))
    return 0


def _bench_peers(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "peers").is_dir():
        raise CannotRun(f"--peers needs a checkout of the project, {root} has no benchmarks")
    search_path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": search_path}).returncode


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mnv2", description="MobileNetV2's inverted residual in one pass."
    )
    parser.add_argument("--version", action="version", version=f"mnv2_kernels {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(command) -> argparse.ArgumentParser:
        summary = command.__doc__.splitlines()[0]
        added = commands.add_parser(command.__name__, help=summary, description=summary)
        added.set_defaults(command=command)
        return added

    count = _positive(int)
    add(info)
    command = add(demo)
    command.add_argument("--output", type=Path, default=Path(), help="folder for the figure")
    command.add_argument("--rounds", type=count, default=30, help="samples of each variant")
    add(verify)
    for command in (add(bench), add(memory)):
        command.add_argument("--batch", type=count, default=1, help="images at once")
        command.add_argument("--resolution", type=count, default=224, help="rows and columns")
    command = commands.choices["memory"]
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of weights, images and result",
    )
    command.add_argument(
        "--model",
        default="mobilenet_v2",
        metavar="NAME",
        help="mobilenet_v2, torchvision:NAME or timm:NAME",
    )
    command.add_argument("--width", type=_positive(float), help="multiplier of MobileNetV2")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    command.add_argument("--figure", type=Path, metavar="FILE", help="draw live bytes over steps")
    command.add_argument(
        "--table", action="store_true", help="print the paper's Table 3 instead, computed anew"
    )
    command = commands.choices["bench"]
    command.add_argument("--width", type=_positive(float), default=1.0, help="multiplier")
    command.add_argument("--rounds", type=count, default=30, help="samples of each variant")
    command.add_argument("--threads", type=count, default=torch.get_num_threads())
    command.add_argument(
        "--peers",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="time other runtimes that are installed too, with what follows as options:"
        " --peers --help",
    )
    add(classify).add_argument("image", type=Path, metavar="IMAGE")
    return parser
