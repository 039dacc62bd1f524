"""`mnv2 verify`: the kernels, or a model that runs on them, against float64."""

import argparse
from collections.abc import Iterator

import torch

from ..profiling import verify as verification
from ..profiling.verify import Result
from .bench import executions_of, truth
from .console import CannotRun, console, progress, table
from .named_models import chosen


def verify(options: argparse.Namespace) -> int:
    """Every kernel that runs here, or a model, against the float64 reference; 1 on a mismatch."""
    of_model = (options.width, options.input_shape, options.batch, options.resolution)
    if options.model is None and of_model != (None, None, 1, 224):
        raise CannotRun("--width, --batch, --resolution and --input-shape need a --model")
    results = _of_kernels() if options.model is None else _of_model(options)
    made = table(
        *("<block", "<input", "<dtype", "<run by", "error", "PyTorch's", "<"),
        caption="largest distance from the float64 reference, of what runs here and of PyTorch",
    )
    wrong = 0
    what = "the kernels" if options.model is None else options.model
    with progress(f"verifying {what}") as tell:
        for result in results:
            tell(f"{made.row_count + 1} done")
            wrong += result.wrong is not None
            made.add_row(
                result.block,
                "x".join(map(str, result.shape)),
                result.dtype,
                result.backend,
                f"{result.error:.1e}",
                f"{result.plain_error:.1e}",
                result.wrong or "ok",
            )
    console().print(made)
    print(f"{made.row_count - wrong} of {made.row_count} right")
    return 1 if wrong else 0


def _of_kernels() -> Iterator[Result]:
    checks = [("cpu", torch.float32)]
    if torch.cuda.device_count():
        checks += [("cuda", d) for d in (torch.float16, torch.bfloat16, torch.float32)]
    found = {check: verification.kernels(*check) for check in checks}
    if not any(running for running, _ in found.values()):
        reasons = "; ".join(dict.fromkeys(r for _, reasons in found.values() for r in reasons))
        raise CannotRun(f"no kernel runs here: {reasons}")
    for check, (running, _) in found.items():
        yield from verification.verify(running, *check)


def _of_model(options: argparse.Namespace) -> Iterator[Result]:
    """The whole model after `fuse`, and as a plan."""
    asked = chosen(options)
    with torch.inference_mode():
        x = asked.random_images()
        expected = truth(asked, x)
        executions, _ = executions_of(asked.model, asked.image)
        folded = executions["folded"](x)
        for name in ("fused", "planned"):
            if name in executions:
                y = executions[name](x)
                yield verification.result(asked.name, x, name, y, folded, expected)
