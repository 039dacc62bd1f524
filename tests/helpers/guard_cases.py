"""What tests of guards share: modules, and what is done to them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from mnv2_kernels.modules.guard import Change
from mnv2_kernels.ops import extension

SAME, WEIGHTS, STRUCTURE = Change


@pytest.fixture(params=["compiled", "twin"], autouse=True)
def kind(request, monkeypatch):
    """Every test is one of the guard in C++ and one of its twin in Python."""
    if request.param == "twin":
        monkeypatch.setattr(extension, "module", None)
    elif extension.module is None:
        pytest.skip(f"no compiled extension: {extension.missing}")
    return request.param


class Settings(NamedTuple):
    sizes: list[int]


class Layer(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.sizes, self.named, self.scale = [1, 2], {"a": 1}, torch.ones(2)
        self.nested, self.settings = [[1], (2, [3])], Settings([4])
        self.scales = [torch.ones(3)]

    def __getattr__(self, name):
        return super().__getattr__(name)


class Other(Layer):
    pass


class Own(nn.Parameter):
    pass


def attribute(name: str, value) -> Callable[[Layer], None]:
    return lambda layer: setattr(layer, name, value)


def data(change: Callable[[Tensor], Tensor]) -> Callable[[Layer], None]:
    def changed(layer: Layer) -> None:
        layer.weight.data = change(layer.weight.data)

    return changed


def quietly(edit: Callable[[Layer], object]) -> Callable[[Layer], object]:
    return torch.no_grad()(edit)


def reordered(layer: Layer) -> None:
    layer.bias, weight = nn.Parameter(torch.ones(4)), layer.weight
    del layer.weight
    layer.weight = weight


def renamed(layer: Layer) -> None:
    norm = layer.norm
    del layer.norm
    layer.other = norm


def loaded(layer: Layer, **options) -> None:
    state = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, **options)


def step(layer: Layer) -> None:
    """As if of a fused optimizer, which counts nothing in tensors."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()


def batch_seen(layer: Layer) -> None:
    layer.norm.num_batches_tracked.data += 1


EDITS: dict[str, tuple[Callable[[Layer], object], Change]] = {
    # Nothing that matters.
    "nothing": (lambda layer: None, SAME),
    "evaluation again": (lambda layer: layer.eval(), SAME),
    "the same parameter": (lambda layer: setattr(layer, "weight", layer.weight), SAME),
    "gradients there": (lambda layer: layer.weight.sum().backward(), SAME),
    "a forward": (lambda layer: layer.norm(torch.ones(1, 4, 2, 2)), SAME),
    "hook and back": (lambda layer: layer.register_forward_hook(print).remove(), SAME),
    # Tensors.
    "parameter in place": (quietly(lambda layer: layer.weight.mul_(2)), WEIGHTS),
    "one element in place": (quietly(lambda layer: layer.weight[1, 1, 0, 1].add_(1)), WEIGHTS),
    "parameter": (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4, 3, 3, 3))), WEIGHTS),
    "parameter of the same memory": (
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data)),
        WEIGHTS,
    ),
    "other data": (data(torch.clone), WEIGHTS),
    "requires_grad": (lambda layer: layer.bias.requires_grad_(False), WEIGHTS),
    "buffer in place": (lambda layer: layer.norm.running_mean.add_(1), WEIGHTS),
    "buffer": (lambda layer: setattr(layer.norm, "running_var", torch.ones(4)), WEIGHTS),
    "counter in place": (lambda layer: layer.norm.num_batches_tracked.add_(1), WEIGHTS),
    "attribute in place": (lambda layer: layer.scale.add_(1), WEIGHTS),
    "tensor in a list in place": (lambda layer: layer.scales[0].add_(1), WEIGHTS),
    "state loaded": (loaded, WEIGHTS),
    "state assigned": (lambda layer: loaded(layer, assign=True), WEIGHTS),
    "swapped": (
        lambda m: torch.utils.swap_tensors(m.weight, nn.Parameter(torch.ones(4, 3, 3, 3))),
        WEIGHTS,
    ),
    "more memory": (lambda layer: layer.weight.untyped_storage().resize_(4096), WEIGHTS),
    "step of an optimizer": (step, WEIGHTS),
    "a batch in training": (
        lambda layer: (layer.norm.train()(torch.ones(2, 4, 2, 2)), layer.norm.eval()),
        WEIGHTS,
    ),
    # Writes that are not counted.
    "data in place": (lambda layer: layer.weight.data.mul_(0.9), WEIGHTS),
    "data of a small buffer": (lambda layer: layer.norm.running_var.data.mul_(0.9), WEIGHTS),
    "data of a counter": (batch_seen, WEIGHTS),
    "NumPy": (lambda layer: layer.weight.detach().numpy().__imul__(0.9), WEIGHTS),
    "foreach": (
        lambda layer: torch._foreach_mul_([p.data for p in layer.parameters()], 0.9),
        WEIGHTS,
    ),
    "negative zero": (lambda layer: layer.norm.bias.data.neg_(), WEIGHTS),
    "shared memory": (lambda layer: layer.share_memory(), WEIGHTS),
    # Anything else.
    "training": (lambda layer: layer.train(), STRUCTURE),
    "attribute": (attribute("stride", (2, 2)), STRUCTURE),
    "equal attribute of another identity": (attribute("padding", tuple([0, 0][:])), STRUCTURE),
    "new attribute": (attribute("forward", lambda x: x), STRUCTURE),
    "deleted attribute": (lambda layer: delattr(layer, "named"), STRUCTURE),
    "item of a list": (lambda layer: layer.sizes.__setitem__(0, 3), STRUCTURE),
    "longer list": (lambda layer: layer.sizes.append(3), STRUCTURE),
    "list in a list": (lambda layer: layer.nested[0].append(2), STRUCTURE),
    "list in a tuple in a list": (lambda layer: layer.nested[1][1].append(2), STRUCTURE),
    "list in a named tuple": (lambda layer: layer.settings.sizes.append(2), STRUCTURE),
    "dictionary of the object": (lambda m: setattr(m, "__dict__", {**vars(m)}), STRUCTURE),
    "class": (attribute("__class__", Other), STRUCTURE),
    "class of a child": (lambda m: setattr(m.act, "__class__", nn.ReLU6), STRUCTURE),
    "child": (attribute("norm", nn.BatchNorm2d(4)), STRUCTURE),
    "new child": (attribute("further", nn.Identity()), STRUCTURE),
    "child renamed": (renamed, STRUCTURE),
    "child without parameters": (attribute("act", nn.ReLU()), STRUCTURE),
    "attribute of a child": (lambda layer: setattr(layer.norm, "eps", 0.5), STRUCTURE),
    "no parameter": (attribute("bias", None), STRUCTURE),
    "deleted parameter": (lambda layer: delattr(layer, "bias"), STRUCTURE),
    "new parameter": (lambda m: setattr(m, "extra", nn.Parameter(torch.ones(1))), STRUCTURE),
    "new buffer": (lambda m: m.register_buffer("extra", torch.ones(1)), STRUCTURE),
    "no buffer": (lambda layer: setattr(layer.norm, "running_mean", None), STRUCTURE),
    "order of parameters": (reordered, STRUCTURE),
    "parameter of another class": (
        lambda layer: setattr(layer, "weight", Own(layer.weight.data)),
        STRUCTURE,
    ),
    "parameter of another shape": (
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4, 3, 1, 1))),
        STRUCTURE,
    ),
    "size in place": (quietly(lambda layer: layer.norm.running_var.resize_(2)), STRUCTURE),
    "part of the data": (data(lambda t: t[:2]), STRUCTURE),
    "the same data in another layout": (data(lambda t: t.transpose(2, 3)), STRUCTURE),
    "the same data as another type": (data(lambda t: t.view(torch.float16)), STRUCTURE),
    "channels last": (lambda layer: layer.to(memory_format=torch.channels_last), STRUCTURE),
    "double": (lambda layer: layer.double(), STRUCTURE),
    "half": (lambda layer: layer.half(), STRUCTURE),
    "another device": (lambda layer: layer.to("meta"), STRUCTURE),
    "freed memory": (lambda layer: layer.weight.untyped_storage().resize_(0), STRUCTURE),
    "tensor that cannot be seen": (lambda m: setattr(m, "scale", m.scale.to_sparse()), STRUCTURE),
    "list that cannot be seen": (lambda layer: layer.sizes.append(layer.sizes), STRUCTURE),
    "hook": (lambda layer: layer.register_forward_hook(print), STRUCTURE),
    "hook before": (lambda layer: layer.norm.register_forward_pre_hook(print), STRUCTURE),
    "hook of gradients": (lambda layer: layer.register_full_backward_hook(print), STRUCTURE),
    "hooks in a new dictionary": (attribute("_forward_hooks", OrderedDict(a=print)), STRUCTURE),
    "no dictionary of hooks": (lambda layer: delattr(layer, "_forward_hooks"), STRUCTURE),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        STRUCTURE,
    ),
    "pruned": (lambda m: prune.random_unstructured(m, "weight", 0.5), STRUCTURE),
}
