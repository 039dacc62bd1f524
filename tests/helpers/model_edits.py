"""What people do to a model between two calls, each done alike to several models of one structure.

`EDITS` have the models and a number, which picks what is edited, counted round. They return the
models, changed or replaced.
"""

import copy
import pickle
from collections.abc import Callable, Sequence
from types import MethodType

import torch
from torch import nn
from torch.nn.utils import parametrize

Models = list[nn.Module]


def _nth(found: Sequence, which: int):
    return found[which % len(found)]


def _named(model: nn.Module, kinds: type | tuple[type, ...]) -> list[str]:
    return [name for name, m in model.named_modules() if name and isinstance(m, kinds)]


def _exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = module


def _factors(tensor: torch.Tensor, which: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(which)
    return torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5


def _floats(tensors: dict) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.is_floating_point()]


@torch.no_grad()
def parameter_in_place(models: Models, which: int) -> Models:
    for model in models:
        parameter = _nth(list(model.parameters()), which)
        parameter.mul_(_factors(parameter, which))
    return models


@torch.no_grad()
def all_parameters_in_place(models: Models, which: int) -> Models:
    for model in models:
        for parameter in model.parameters():
            parameter.mul_(_factors(parameter, which))
    return models


@torch.no_grad()
def buffer_in_place(models: Models, which: int) -> Models:
    for model in models:
        buffers = dict(model.named_buffers())
        names = _floats(buffers)
        if names:
            buffer = buffers[_nth(names, which)]
            buffer.mul_(_factors(buffer, which))
    return models


def data_then_eval(models: Models, which: int) -> Models:
    for model in models:
        data = _nth(list(model.parameters()), which).data
        data.mul_(_factors(data, which))
        model.train(model.training)
    return models


def parameter_replaced(models: Models, which: int) -> Models:
    for model in models:
        owned = [(m, n) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        module, name = _nth(owned, which)
        old = module._parameters[name]
        setattr(module, name, nn.Parameter(old.detach() * _factors(old, which)))
    return models


def _other_state(model: nn.Module, which: int) -> dict:
    state = copy.deepcopy(model.state_dict())
    for name in _floats(state):
        state[name] = state[name] * _factors(state[name], which)
    return state


def state_loaded(models: Models, which: int) -> Models:
    state = _other_state(models[0], which)
    for model in models:
        model.load_state_dict(state)
    return models


def state_assigned(models: Models, which: int) -> Models:
    state = _other_state(models[0], which)
    for model in models:
        model.load_state_dict(copy.deepcopy(state), assign=True)
    return models


def eps_changed(models: Models, which: int) -> Models:
    for model in models:
        norms = [m for m in model.modules() if isinstance(getattr(m, "eps", None), float)]
        if norms:
            _nth(norms, which).eps = 0.3
    return models


def bound_changed(models: Models, which: int) -> Models:
    for model in models:
        clips = [m for m in model.modules() if isinstance(m, nn.Hardtanh)]
        if clips:
            _nth(clips, which).max_val = 0.75
    return models


def activation_exchanged(models: Models, which: int) -> Models:
    for model in models:
        names = _named(model, (nn.ReLU, nn.Hardtanh))
        if names:
            _exchange(model, _nth(names, which), nn.Mish().train(model.training))
    return models


def norm_exchanged(models: Models, which: int) -> Models:
    for model in models:
        names = _named(model, nn.BatchNorm2d)
        if names:
            name = _nth(names, which)
            old = model.get_submodule(name)
            norm = nn.GroupNorm(1, old.num_features).to(next(model.parameters()).dtype)
            _exchange(model, name, norm.train(model.training))
    return models


def _doubling_forward(module, x):
    return 2 * type(module).forward(module, x)


def forward_replaced(models: Models, which: int) -> Models:
    for model in models:
        conv = model.get_submodule(_nth(_named(model, nn.Conv2d), which))
        # A bound method: copies of the model get one that is bound to the copy.
        conv.forward = MethodType(_doubling_forward, conv)
    return models


def padding_mode_changed(models: Models, which: int) -> Models:
    for model in models:
        model.get_submodule(_nth(_named(model, nn.Conv2d), which)).padding_mode = "circular"
    return models


def _doubled(module, args, y):
    return 2 * y


def hook_that_doubles(models: Models, which: int) -> Models:
    for model in models:
        name = _nth([name for name, _ in model.named_modules()], which)
        model.get_submodule(name).register_forward_hook(_doubled)
    return models


def hook_removed(models: Models, which: int) -> Models:
    for model in models:
        for module in model.modules():
            module._forward_hooks.clear()
    return models


def one_norm_training(models: Models, which: int) -> Models:
    for model in models:
        names = _named(model, nn.BatchNorm2d)
        if names:
            model.get_submodule(_nth(names, which)).train()
    return models


def evaluation(models: Models, which: int) -> Models:
    return [model.eval() for model in models]


def to_bfloat16(models: Models, which: int) -> Models:
    return [model.to(torch.bfloat16) for model in models]


def to_float32(models: Models, which: int) -> Models:
    return [model.float() for model in models]


def to_float64(models: Models, which: int) -> Models:
    return [model.double() for model in models]


def to_channels_last(models: Models, which: int) -> Models:
    return [model.to(memory_format=torch.channels_last) for model in models]


def copied(models: Models, which: int) -> Models:
    return copy.deepcopy(models)


def pickled(models: Models, which: int) -> Models:
    parts = list(models[0].modules())
    if any(parametrize.is_parametrized(m) or "forward" in vars(m) for m in parts):
        return models  # Neither PyTorch nor pickle takes these.
    return pickle.loads(pickle.dumps(models))


def frozen_weights(models: Models, which: int) -> Models:
    return [model.requires_grad_(which % 2 == 0) for model in models]


EDITS: dict[str, Callable[[Models, int], Models]] = {
    edit.__name__: edit
    for edit in (
        parameter_in_place,
        all_parameters_in_place,
        buffer_in_place,
        data_then_eval,
        parameter_replaced,
        state_loaded,
        state_assigned,
        eps_changed,
        bound_changed,
        activation_exchanged,
        norm_exchanged,
        forward_replaced,
        padding_mode_changed,
        hook_that_doubles,
        hook_removed,
        one_norm_training,
        evaluation,
        to_bfloat16,
        to_float32,
        to_float64,
        to_channels_last,
        copied,
        pickled,
        frozen_weights,
    )
}
