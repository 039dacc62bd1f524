"""Every way in which the weights of a model are changed between two calls.

`CHANGES` take several models of one structure and do the same to each, so that a plain one stays
the measure of a fused one.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Models = Sequence[nn.Module]
CHANGES: dict[str, Callable[[Models], None]] = {}


def change(function):
    """Enter a change of one model; it is done to each, with the same random numbers."""

    def do(models: Models) -> None:
        for model in models:
            torch.manual_seed(7)
            function(model)

    CHANGES[function.__name__.replace("_", " ")] = do
    return function


def _convs(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _middle(model: nn.Module) -> nn.Conv2d:
    names = _convs(model)
    return model.get_submodule(names[len(names) // 2])


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@change
def data_scaled(model):
    for p in model.parameters():
        p.data.mul_(0.9)


@change
def data_scaled_in_inference_mode(model):
    for p in model.parameters():
        with torch.inference_mode():
            p.data.mul_(0.9)


@change
def written_through_numpy(model):
    for p in model.parameters():
        array = p.detach().numpy()
        array *= 0.9


@change
def one_weight_written_through_numpy(model):
    array = _middle(model).weight.data.numpy()
    array[:] = array[::-1].copy()


@change
def written_through_a_detached_view(model):
    for p in model.parameters():
        p.detach().view(-1).mul_(0.9)


@change
def written_through_dlpack(model):
    for p in model.parameters():
        torch.from_dlpack(p.detach()).mul_(0.9)


@change
def foreach_on_data(model):
    torch._foreach_mul_([p.data for p in model.parameters()], 0.9)


@change
def foreach_on_parameters(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.9)


@change
def scaled_without_grad(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)


@change
def one_element(model):
    with torch.no_grad():
        _middle(model).weight[0, 0] += 5


@change
def one_block_through_data(model):
    _middle(model).weight.data.mul_(-0.9)


@change
def other_data(model):
    weight = _middle(model).weight
    weight.data = torch.randn_like(weight)


@change
def other_data_of_the_first_convolution(model):
    weight = model.get_submodule(_convs(model)[0]).weight
    weight.data = weight.data * torch.rand_like(weight) * 2


@change
def vector_to_parameters_(model):
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector * 0.9, model.parameters())


@change
def state_loaded(model):
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})


@change
def state_assigned(model):
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}, assign=True)


def _step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p) * p.detach().abs().mean()
    optimizer.step()
    model.zero_grad()


@change
def step_of_sgd(model):
    _step(model, torch.optim.SGD(model.parameters(), lr=0.2, foreach=False))


@change
def step_of_sgd_foreach(model):
    _step(model, torch.optim.SGD(model.parameters(), lr=0.2, foreach=True))


@change
def step_of_sgd_fused(model):
    _step(model, torch.optim.SGD(model.parameters(), lr=0.2, fused=True))


@change
def step_of_adam_fused(model):
    _step(model, torch.optim.Adam(model.parameters(), lr=0.02, fused=True))


@change
def step_of_adam_foreach(model):
    _step(model, torch.optim.Adam(model.parameters(), lr=0.02, foreach=True))


@change
def average_copied(model):
    """As an exponential moving average writes into the model that is served."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.9 * p + 0.1 * torch.randn_like(p))


@change
def average_copied_into_data(model):
    for p in model.parameters():
        p.data.copy_(0.9 * p.data + 0.1 * torch.randn_like(p))


@change
def swapped_in_and_out(model):
    """The habit of EMA classes: store, copy the shadow in, restore half of it."""
    kept = [p.data.clone() for p in model.parameters()]
    for i, p in enumerate(model.parameters()):
        p.data = p.data * 0.8
        if i % 2:
            p.data.copy_(kept[i])


@change
def statistics(model):
    for norm in _norms(model):
        norm.running_mean.add_(torch.rand_like(norm.running_mean))
        norm.running_var.mul_(1.5)


@change
def statistics_through_data(model):
    for norm in _norms(model):
        norm.running_var.data.mul_(1.5)


@change
def statistics_replaced(model):
    for norm in _norms(model):
        norm.running_mean = norm.running_mean + 0.5


@change
def norm_weights_of_one_block(model):
    norms = _norms(model)
    norms[len(norms) // 2].weight.data.mul_(-1)


@change
def parameter_replaced(model):
    conv = _middle(model)
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


@change
def module_replaced(model):
    names = _convs(model)
    name = names[len(names) // 2]
    other = copy.deepcopy(model.get_submodule(name))
    with torch.no_grad():
        other.weight.mul_(-1)
    model.set_submodule(name, other)


@change
def norm_replaced(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    model.set_submodule(name, nn.BatchNorm2d(model.get_submodule(name).num_features).eval())


@change
def eps_changed(model):
    for norm in _norms(model):
        norm.eps = 0.5


@change
def to_bfloat16_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


@change
def to_bfloat16(model):
    model.to(torch.bfloat16)


@change
def layers_initialised_again(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
