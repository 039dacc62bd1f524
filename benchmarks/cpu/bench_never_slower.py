"""Is a fused network ever slower than its plain layers?

    python -m benchmarks.cpu.bench_never_slower [--quick]

torchvision's mobilenet_v2, plain and fused in turns in one process: CPU time of one thread, and the
ratios of fused to plain, of medians and of minima. Slower is where both are above the limit, since
what else runs on the machine moves one of them alone; the exit status is then 1.

A row of parameters' gradients includes the gradient of x. A tuning step is forward, backward and a
step of SGD with frozen batch norms; the others run in evaluation mode with trainable parameters.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from mnv2_kernels import freeze_bn, fuse

from .. import harness

LIMIT = 1.02
SIZES = (7, 32, 96, 224)
BATCHES = (1, 8)
DTYPES = (torch.float32, torch.float64)
Call = Callable[[], object]


def forward(model: nn.Module, x: Tensor) -> Call:
    @torch.inference_mode()
    def call():
        model(x)

    return call


def gradient_of_x(model: nn.Module, x: Tensor) -> Call:
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(model(x).mean(), x)


def all_gradients(model: nn.Module, x: Tensor) -> Call:
    tensors = [x.clone().requires_grad_(), *model.parameters()]
    return lambda: torch.autograd.grad(model(tensors[0]).mean(), tensors)


def tuning_step(model: nn.Module, x: Tensor) -> Call:
    model = freeze_bn(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def call():
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()

    return call


WORK = {
    "forward": forward,
    "gradient of x": gradient_of_x,
    "of x and parameters": all_gradients,
    "tuning step": tuning_step,
}


def in_turns(calls: dict[str, Call], seconds: float, least: int) -> dict[str, list[float]]:
    """CPU seconds of every call, at least so many and for about so long."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call(), call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["plain"]) < least:
        # Each goes first as often as the other: the second finds other things in the caches.
        turns = list(calls) if len(found["plain"]) % 2 else list(calls)[::-1]
        for name in turns:
            start = time.process_time()
            calls[name]()
            found[name].append(time.process_time() - start)
    return found


def measure(
    models: dict[str, nn.Module], work: str, x: Tensor, seconds: float, least: int
) -> tuple[str, bool]:
    """A line of the table, and whether fused is slower there."""
    calls = {name: WORK[work](model, x) for name, model in models.items()}
    samples = in_turns(calls, seconds, least)
    middle = {name: statistics.median(s) for name, s in samples.items()}
    lowest = {name: min(s) for name, s in samples.items()}
    ratios = middle["fused"] / middle["plain"], lowest["fused"] / lowest["plain"]
    slower = min(ratios) > LIMIT
    verdict = "SLOWER" if slower else "unclear" if max(ratios) > LIMIT else "ok"
    dtype = str(x.dtype).removeprefix("torch.")
    line = (
        f"{work:20} {dtype:8} {x.shape[-1]:5} {len(x):5} {len(samples['plain']):6}"
        f" {1e3 * middle['plain']:9.2f} {1e3 * middle['fused']:9.2f}"
        f" {ratios[0]:8.3f} {ratios[1]:8.3f}  {verdict}"
    )
    return line, slower


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds")
    parser.add_argument("--seconds", type=float, default=4, help="of every row (default 4)")
    parser.add_argument("--work", nargs="*", choices=WORK, default=list(WORK), help="rows to run")
    parser.add_argument("--sizes", nargs="*", type=int, default=None, help="rows of the inputs")
    options = parser.parse_args(arguments)
    sizes = options.sizes or (SIZES[:2] if options.quick else SIZES)
    seconds, least = (0.5, 5) if options.quick else (options.seconds, 11)
    torch.set_num_threads(1)
    name, model = harness.network()
    print(f"{name}, CPU milliseconds of one thread, torch {torch.__version__}")
    print(
        f"{'':20} {'dtype':8} {'input':>5} {'batch':>5} {'rounds':>6} {'plain':>9} {'fused':>9}"
        f" {'medians':>8} {'minima':>8}  verdict"
    )
    slower = 0
    for dtype in DTYPES:
        plain = model.to(dtype)
        models = {"plain": plain, "fused": fuse(plain)}
        for size, batch, work in product(sizes, BATCHES, options.work):
            x = harness.image(3, size, batch).contiguous().to(dtype)
            line, is_slower = measure(models, work, x, seconds, least)
            print(line, flush=True)
            slower += is_slower
    print(f"{slower} slower by more than {LIMIT - 1:.0%}" if slower else "never slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
