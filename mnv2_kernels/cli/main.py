"""The command line: `mnv2 info | demo | verify | bench | memory | classify IMAGE`.

Exit status: 0 done, 1 a result is wrong, 2 it could not be done (one sentence on stderr).
"""

import argparse
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..fuse.fuse import fuse
from ..modules.mobilenet_v2 import mobilenet_v2
from ..network.plan import plan, why_not_on_cpu
from ..ops.backends import backends
from ..ops.extension import missing
from ..ops.extension import module as _C
from ..profiling import memory_report
from ..profiling import table_3 as paper_networks
from ..profiling import verify as verification
from ..profiling.timing import num_threads
from ..profiling.variants import plain, variants
from . import demo as demonstration
from .named_models import UnknownModel, named_model
from .pretrained import MissingPackage, WrongWeights, efficientnet_lite0, require

# Decoders of formats that photographs come in; among the others is one that runs PostScript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class CannotRun(Exception):
    """The command cannot be carried out; the sentence says why."""


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
        "mnv2_kernels": Path(__file__).parents[1],
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


def classify(options: argparse.Namespace) -> int:
    """Top five classes of an image file by the fused EfficientNet-Lite0."""
    image = read_image(options.image)
    network = efficientnet_lite0()
    model = fuse(network.model)
    with torch.inference_mode():
        probabilities = model(network.preprocess(image))[0].softmax(0)
    for probability, index in zip(*probabilities.topk(5), strict=True):
        print(f"{probability.item():.3f}  {network.class_names[index]}")
    return 0


def read_image(path: Path):
    """The image in a file, upright and RGB.

    Raises:
        CannotRun: there is no such file, or it holds no image that can be read safely.
    """
    require("PIL")
    from PIL import Image, ImageOps

    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise CannotRun(f"IMAGE must be an image file, and {path} {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as file:
                image, mode = ImageOps.exif_transpose(file), file.mode
                if mode.startswith("I;16"):
                    # Conversion to RGB would cut off at 255.
                    image = image.convert("I").point(lambda value: value / 257).convert("L")
                image = image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise CannotRun(f"IMAGE must have at most {limit} pixels, {path} has more") from error
    except Exception as error:
        # Decoders raise nearly anything on hostile bytes: OSError, ValueError, SyntaxError ...
        formats = ", ".join(IMAGE_FORMATS)
        raise CannotRun(
            f"IMAGE must be a complete {formats} file, {path} is not: {error}"
        ) from error
    if mode in ("I", "F"):
        raise CannotRun(f"IMAGE must have 8 or 16 bits a channel, {path} has 32")
    return image


def demo(options: argparse.Namespace) -> int:
    """Trained networks, plain against fused: answers, speed, memory and a figure."""
    if not (options.output.is_dir() and os.access(options.output, os.W_OK)):
        raise CannotRun(f"--output must be a folder that can be written to, got {options.output}")
    return demonstration.demo(_console(), options.output, rounds=options.rounds)


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
    _console().print(table)
    print(f"{table.row_count - wrong} of {table.row_count} right")
    return 1 if wrong else 0


def bench(options: argparse.Namespace) -> int:
    """MobileNetV2 plain, folded and fused, timed in turns; or beside other runtimes."""
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
        _console().print(demonstration.performance(title, copies, x, options.rounds))
    return 0


def _bench_peers(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "peers").is_dir():
        raise CannotRun(f"--peers needs a checkout of the project, {root} has no benchmarks")
    search_path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": search_path}).returncode


def memory(options: argparse.Namespace) -> int:
    """Bytes a network holds, eager, folded, fused and planned: by arithmetic and measured."""
    if options.table:
        _print_table_3()
        return 0
    if missing is not None:
        raise CannotRun(f"needs the compiled kernels: {missing}")
    for path in (options.json, options.figure):
        if path is not None and not path.parent.is_dir():
            raise CannotRun(f"the folder of {path} must exist")
    if options.figure is not None:
        require("matplotlib")
    model = named_model(options.model, options.width)
    size, dtype = options.resolution, getattr(torch, options.dtype)
    # What the kernels do not run has the schedule of the model's own dtype.
    runs = why_not_on_cpu(dtype) is None
    try:
        schedule = plan(model, (3, size, size), dtype=dtype if runs else None)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    report = memory_report.measure(options.model, model, schedule, options.batch, dtype)
    _print_memory(report)
    if options.json is not None:
        report.write_json(options.json)
    if options.figure is not None:
        try:
            report.figure(options.figure)
        except ValueError as error:
            raise CannotRun(f"--figure must be a file that can be drawn: {error}") from error
    return 0


def _print_memory(report: memory_report.MemoryReport) -> None:
    shape = "x".join(map(str, report.x_shape))
    steps = Table(
        title=f"{report.model}, {shape}, {report.dtype_name}, threads: {report.threads}",
        caption="KiB held in each step, computed / measured; input and result included, weights"
        " not",
    )
    for heading in ("step", *report.executions):
        steps.add_column(heading, justify="left" if heading == "step" else "right")
    for i, name in enumerate(report.steps):
        cells = [name or "(the model)"]
        for held in report.executions.values():
            measured = held.measured[i]
            seen = "-" if measured is None else f"{measured / 1024:.0f}"
            cells.append(f"{held.computed[i] / 1024:.0f} / {seen}")
        steps.add_row(*cells)
    peaks = Table(title="Peak bytes")
    for heading in ("execution", "computed", "measured", "of eager"):
        peaks.add_column(heading, justify="left" if heading == "execution" else "right")
    eager = report.executions["eager"].peak_measured
    for name, held in report.executions.items():
        peak = held.peak_measured
        seen, of_eager = ("-", "-") if peak is None else (f"{peak:,}", f"{peak / eager:.1%}")
        peaks.add_row(name, f"{held.peak_computed:,}", seen, of_eager)
    console = _console()
    console.print(steps)
    console.print(peaks)
    reasons: dict[str, list[str]] = {}
    for name, held in report.executions.items():
        if held.why_not_measured is not None:
            reasons.setdefault(held.why_not_measured, []).append(name)
    for reason, names in reasons.items():
        print(f"{' and '.join(names)}: not measured: {reason}; line buffers are float32's.")
    print(
        "computed: exact for planned; without the scratch of kernels for the others, and without"
        " what\nmodules inside a block hold for longer than they need it.\n"
        f"planned: arena {report.arena_bytes:,}, line buffers and scratch {report.line_bytes:,}"
        f" on {report.threads} thread{'s' * (report.threads > 1)}.\n"
        f"paper's M(G), blocks split into single hidden channels: {report.paper_bound:,}.\n"
        f"weights, not counted: {report.weight_bytes:,}."
    )


def _print_table_3() -> None:
    console = _console()
    reasons: list[str] = []

    def note(reason: str | None) -> str:
        if reason is None:
            return ""
        if reason not in reasons:
            reasons.append(reason)
        return f" [{reasons.index(reason) + 1}]"

    for version in paper_networks.VERSIONS:
        table = Table(
            title=f"Table 3 of arXiv 1801.04381, {version} version: channels/kB at 16 bit",
            caption="from the layers | as printed; 1 kB is 1000 bytes",
        )
        table.add_column("size")
        for network in paper_networks.NETWORKS:
            table.add_column(network, justify="right")
        cells = paper_networks.table_3(version)
        for size in (*paper_networks.SIZES, None):
            row = ["max" if size is None else f"{size}x{size}"]
            for cell in (c for c in cells if c.size == size):
                ours = _channels_and_kb(cell.channels, cell.nbytes and cell.nbytes / 1000)
                printed = _channels_and_kb(cell.printed_channels, cell.printed_kb)
                row.append(escape(f"{ours} | {printed}{note(cell.reason)}"))
            table.add_row(*row)
        console.print(table)
    for number, reason in enumerate(reasons, 1):
        print(f"[{number}] {reason}.")


def _channels_and_kb(channels: int | None, kilobytes: float | None) -> str:
    if kilobytes is None:
        return "1/O(1)"
    return f"{kilobytes:.4g}" if channels is None else f"{channels}/{kilobytes:.4g}"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=120)


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
