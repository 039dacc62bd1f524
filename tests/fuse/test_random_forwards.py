"""Random edits of a block's forward never change what the fused model answers."""

import pytest
import torch
from same_answers import (
    gradients,
    image,
    in_double,
    randomise,
    unambiguous_input,
    why_other,
    why_other_gradient,
)
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock
from written_forwards import write

import mnv2_kernels as mk

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]

SEEDS = range(200)
SHAPE = 2, 8, 12, 12


def why_wrong(seed: int) -> str | None:
    """Where the fused module's results or gradients are not its layers'."""
    torch.manual_seed(seed)
    written = write(seed)
    plain = randomise(written.module)
    if seed % 3 == 0:
        plain = nn.Sequential(randomise(TorchvisionBlock(8, 8, 1, 2)), plain).eval()
    fused, exact = mk.fuse(plain), in_double(plain)
    with_other = written.takes_other and seed % 3 and seed % 2

    def arguments(x):
        return ((x, x.mean((1, 2, 3), keepdim=True) + 1) if with_other else (x,)), {}

    x = image(*SHAPE, seed=seed)
    with torch.no_grad():
        for turn in range(2):
            args, _ = arguments(x + turn)
            exact_args, _ = arguments((x + turn).double())
            reason = why_other(fused(*args), plain(*args), exact(*exact_args))
            if reason is not None:
                return f"call {turn}: {reason}"
    if seed % 2 == 0:
        x = unambiguous_input(plain, arguments, SHAPE)
        truth = gradients(exact, arguments, x.double())
        expected, found = gradients(plain, arguments, x), gradients(fused, arguments, x)
        if (reason := why_other_gradient(found[1], expected[1], truth[1])) is not None:
            return f"gradient of x: {reason}"
        for name, gradient in expected[2].items():
            reason = why_other_gradient(found[2][name], gradient, truth[2][name])
            if reason is not None:
                return f"gradient of {name}: {reason}"
    plain.train()
    fused.train()
    # A dropout draws its numbers in the order of memory, and a fused block gives channels_last.
    x = x.contiguous(memory_format=torch.channels_last)
    expected, found = gradients(plain, arguments, x), gradients(fused, arguments, x)
    if (reason := why_other(found[0], expected[0])) is not None:
        return f"training: {reason}"
    buffers = dict(fused.named_buffers())
    for name, buffer in plain.named_buffers():
        if (reason := why_other(buffers[name], buffer)) is not None:
            return f"training, {name}: {reason}"
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_are_those_of_the_layers(seed):
    reason = why_wrong(seed)
    assert reason is None, f"{reason}\n{write(seed).source}"


def test_those_without_edits_run_fused():
    """A forward that is just the block, in every way of writing it, is not declined."""
    blocks = {seed: written for seed in SEEDS if (written := write(seed)).is_block}
    assert len(blocks) > 20
    wrong = []
    for seed, written in blocks.items():
        rows = mk.explain(mk.fuse(randomise(written.module)))
        if [row.state for row in rows] != ["fused"]:
            wrong.append(f"seed {seed}: {rows}\n{written.source}")
    assert not wrong, "\n".join(wrong)


def test_the_edits_are_of_every_kind():
    """The seeds reach blocks with and without edits, second inputs, both ways of writing."""
    sources = [write(seed).source for seed in SEEDS]
    for part in (
        "F.pad",
        "* 0.5",
        "clamp",
        "torch.cat",
        "other",
        "self.same",
        "dropout",
        "self.drop",
    ):
        assert sum(part in source for source in sources) >= 5, part
    assert len(set(sources)) > 150
