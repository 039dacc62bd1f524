"""What is checked of a whole model after `fuse`, column by column."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import mnv2_kernels as mk
from mnv2_kernels.block.fold import BlockLayers, fold_conv_norm
from mnv2_kernels.fuse.find import find
from mnv2_kernels.ops.reference import activate
from mnv2_kernels.recognizers import evaluation_mode


def enliven(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in evaluation mode, with batch norms that make its activations use both clips.

    Every norm gets a random scale and shift around which ReLU6 acts at both ends, and the
    statistics of what it sees for the images `x` (N, 3, H, W), slightly off.
    """
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(3, 5)
            norm.bias.normal_(1.5, 1)
            norm.momentum = 1.0
        model.train()(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            # At the deepest layers of small images a channel may have a single value.
            norm.running_var.clamp_(min=0.05).mul_(torch.rand_like(norm.running_var) / 2 + 0.75)
            norm.running_mean.add_(torch.randn_like(norm.running_mean) / 10)
    return model.eval()


def values(output) -> list[Tensor]:
    """Every tensor of a model's result, whatever it is made of."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def largest_error(found, expected) -> float:
    """The largest error of any tensor, over that tensor's largest value; inf for other shapes."""
    found, expected = values(found), values(expected)
    if [t.shape for t in found] != [t.shape for t in expected] or not found:
        return float("inf")
    worst = 0.0
    for y, z in zip(found, expected, strict=True):
        if not z.isfinite().all():
            return float("inf")
        error = ((y.double() - z.double()).abs().max() / z.double().abs().max()).item()
        worst = error if error > worst or error != error else worst
    return worst


def clipped_ends(layers: BlockLayers, x: Tensor) -> Iterator[tuple[str, bool, bool]]:
    """(stage, whether a bound acts, whether it is finite) of expansion and depthwise on x."""
    config, lead = layers.config, layers.lead
    if lead is not None:
        weight, bias = fold_conv_norm(lead.stage)
        top, left, bottom, right = lead.padding
        x = F.pad(x, (left, right, top, bottom))
        x = F.conv2d(x, weight, bias.to(x), lead.stride, 0, lead.dilation, len(weight))
    for name, stage in (("expansion", layers.expand), ("depthwise", layers.depthwise)):
        if stage is None:
            continue
        weight, bias = fold_conv_norm(stage)
        is_depthwise = stage is layers.depthwise
        top, left, bottom, right = config.padding if is_depthwise else layers.pads
        x = F.pad(x, (left, right, top, bottom))
        groups = 1 if config.dense else len(weight)
        sizes = (config.stride, 0, config.dilation, groups) if is_depthwise else ()
        x = F.conv2d(x, weight, bias.to(x), *sizes)
        if not isinstance(stage.clip, str):
            lower, upper = stage.clip
            yield f"{name} lower", bool((x < lower).any()), lower != -torch.inf
            yield f"{name} upper", bool((x > upper).any()), upper != torch.inf
        x = activate(x, stage.clip)


def idle_clips(model: nn.Module, x: Tensor) -> list[str]:
    """The bounds of recognised blocks that cut off nothing when the model runs on x."""
    with evaluation_mode(model):
        blocks = {f.first: f for f in find(model) if f.reading is not None}
    inputs: dict[str, Tensor] = {}

    def remember(name: str):
        def hook(module, args):
            inputs.setdefault(name, args[0])  # And no result, which would be the input.

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in blocks
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        return [
            f"{block.name} {end}"
            for name, block in blocks.items()
            for end, acts, finite in clipped_ends(
                block.make().call_for(inputs[name]).layers, inputs[name]
            )
            if finite and not acts
        ]


def error(found: nn.Module, expected: nn.Module, x: Tensor) -> float:
    """The largest error of one model's results against another's."""
    with torch.no_grad():
        return largest_error(found(x), expected(x))


def compiles(model: nn.Module, x: Tensor) -> float:
    """The error of the model captured by torch.compile, in one graph, against the model itself.

    The graph is run as it is: what a compiler makes of a block is tested with single blocks.
    """
    torch._dynamo.reset()
    return error(torch.compile(model, fullgraph=True, backend="eager"), model, x)


def exports(model: nn.Module, x: Tensor) -> float:
    """The error of the exported program against the model itself."""
    return error(torch.export.export(model, (x,)).module(), model, x)


def train_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every parameter and buffer after one step of SGD in training mode."""
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(5)
    loss = sum(y.square().mean() for y in values(trained(x)) if y.is_floating_point())
    loss.backward()
    optimizer.step()
    return list(trained.state_dict().values())


@dataclass(frozen=True)
class Counts:
    """How many blocks of a model are fused, and why the others are not."""

    fused: int
    declined: tuple[tuple[str, int], ...]
    others: int


def count(model: nn.Module) -> Counts:
    rows = mk.explain(model)
    reasons = Counter(row.reason for row in rows if row.state == "declined")
    fused = sum(row.state in ("fused", "fusable", "plain") for row in rows)
    return Counts(fused, tuple(sorted(reasons.items())), len(rows.outside))
