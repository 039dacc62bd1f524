"""The command line: `mnv2 info | demo | explain | verify | bench | memory | classify IMAGE`.

Exit status: 0 done, 1 a result is wrong, 2 it could not be done (one sentence on stderr).
"""

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__
from ..fuse import explain as explanation
from ..ops.backends import backends
from ..ops.extension import module as _C
from ..ops.optional import MissingPackage
from . import named_models
from .bench import bench
from .classify import classify
from .console import CannotRun, check_can_write, console, write_json
from .demo import demonstrate
from .memory import memory
from .named_models import UnknownModel
from .pretrained import WrongWeights
from .verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, sys.argv's by default. Returns the exit status."""
    options = _parser().parse_args(arguments)

    def show(message, *_, **__) -> None:
        print(f"mnv2 {options.name}: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            return options.command(options)
    except (CannotRun, MissingPackage, UnknownModel, WrongWeights, OSError) as error:
        show(error)
        return 2
    except KeyboardInterrupt:
        return 130


def info(options: argparse.Namespace) -> int:
    """What runs here, and what it was built from."""
    check_can_write(options.json, "--json")
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
    write_json(options.json, rows)
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
    """Trained networks, layer by layer against fused: answers, speed, memory and a figure."""
    if not (options.output.is_dir() and os.access(options.output, os.W_OK)):
        raise CannotRun(f"--output must be a folder that can be written to, got {options.output}")
    return demonstrate(console(), options.output, rounds=options.rounds)


def explain(options: argparse.Namespace) -> int:
    """Which blocks of a model can run fused, and why the others cannot."""
    asked = named_models.chosen(options)
    try:
        report = explanation.explain(asked.model, input_shape=asked.image)
    except ValueError as error:
        raise CannotRun(str(error).removeprefix("explain: ")) from error
    print(report)
    return 0


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

    count, number = _positive(int), _positive(float)
    command = add(info)
    command.add_argument("--json", type=Path, metavar="FILE", help="write every fact there too")
    command = add(demo)
    command.add_argument("--output", type=Path, default=Path(), help="folder for the figure")
    command.add_argument("--rounds", type=count, default=30, help="samples of each execution")
    for command in map(add, (explain, verify, bench, memory)):
        named_models.add_options(command, count, number)
    commands.choices["verify"].set_defaults(model=None)
    for command in (commands.choices[name] for name in ("bench", "memory")):
        command.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    command = commands.choices["memory"]
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of weights, images and result",
    )
    command.add_argument("--figure", type=Path, metavar="FILE", help="draw live bytes over steps")
    command.add_argument(
        "--train",
        action="store_true",
        help="measure a training step instead: eager, with activation checkpointing, fused",
    )
    command.add_argument(
        "--table", action="store_true", help="print the paper's Table 3 instead, computed anew"
    )
    command = commands.choices["bench"]
    command.add_argument("--rounds", type=count, default=30, help="samples of each execution")
    command.add_argument(
        "--threads",
        type=count,
        default=torch.get_num_threads(),
        help="of PyTorch, at most the cores",
    )
    command.add_argument(
        "--peers",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="time other runtimes that are installed too, with what follows as options:"
        " --peers --help",
    )
    add(classify).add_argument("image", type=Path, metavar="IMAGE")
    return parser
