"""Guards of modules: which elements of tensors are compared, and tensors of all kinds."""

import itertools
import multiprocessing
import operator

import guard_cases
import pytest
import torch
from guard_cases import SAME, STRUCTURE, WEIGHTS, Layer
from torch import Tensor, nn

from mnv2_kernels.modules.guard import Guard

kind = guard_cases.kind


def holder(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


TENSORS = {
    "one element": torch.ones(()),
    "a few": torch.arange(8.0),
    "a few, strided": torch.ones(16)[::2],
    "a few, transposed": torch.ones(4, 2).t(),
    "a few, expanded": torch.ones(4, 1).expand(4, 100),
    "one, expanded": torch.ones(()).expand(3, 50),
    "a few behind others": torch.ones(100)[95:],
    "a column": torch.ones(5, 1000)[:, -1],
    "overlapping": torch.ones(4).as_strided((3, 2), (1, 1)),
    **{
        str(t).removeprefix("torch."): torch.ones(5).to(t)
        for t in (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)
    },
    **{
        str(t).removeprefix("torch."): torch.ones(5).to(t)
        for t in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("name", TENSORS)
def test_each_element_of_small_tensors(name):
    """Each byte of each element, without anybody counting it."""
    tensor = TENSORS[name]
    guard = Guard([holder(tensor)])
    memory = tensor.untyped_storage()
    size, start = tensor.element_size(), tensor.storage_offset()
    indices = itertools.product(*map(range, tensor.shape))
    offsets = {start + sum(map(operator.mul, i, tensor.stride())) for i in indices}
    for at in {offset * size + byte for offset in offsets for byte in range(size)}:
        memory[at] = memory[at] ^ 1
        assert guard.check() is WEIGHTS
        assert guard.check() is SAME


@pytest.mark.parametrize("shape", [(9,), (100,), (64, 3, 3, 3), (3, 1001), (2, 1, 8, 1)])
@pytest.mark.parametrize("view", ["plain", "transposed", "strided", "flipped back"])
def test_elements_that_are_compared(shape, view):
    """Eight elements, first and last among them, and no ninth of the tensor without any."""
    base = torch.zeros(*shape, 2)
    tensor = {
        "plain": lambda: base[..., 0].clone(),
        "transposed": lambda: base[..., 0].clone().transpose(0, -1),
        "strided": lambda: base[..., 0],
        "flipped back": lambda: base.flip(0)[..., 0],
    }[view]()
    guard = Guard([holder(tensor)])
    indices = [*itertools.product(*map(range, tensor.shape))]
    seen = []
    for number, index in enumerate(indices):
        tensor.data[index] = 1
        if guard.check() is WEIGHTS:
            seen.append(number)
    assert len(seen) == 8 and seen[0] == 0 and seen[-1] == len(indices) - 1
    assert max(b - a for a, b in zip(seen, seen[1:], strict=False)) <= len(indices) // 7 + 1


def test_bits_of_what_is_no_number():
    layer = Layer()
    layer.bias.data.fill_(float("nan"))
    guard = Guard([layer])
    assert guard.check() is SAME
    layer.bias.data.view(torch.int32).bitwise_xor_(1)
    assert layer.bias.isnan().all()
    assert guard.check() is WEIGHTS


def test_parameters_that_are_views_of_one_vector():
    layer = Layer()
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, layer.parameters())
    guard = Guard(layer.modules())
    vector.mul_(0.9)
    assert guard.check() is WEIGHTS and guard.check() is SAME


def test_memory_shared_with_another_process():
    layer = Layer().share_memory()
    guard = Guard(layer.modules())
    array = layer.norm.weight.detach().numpy()
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        assert guard.check() is SAME
        child = context.Process(target=array.__iadd__, args=(1,))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert guard.check() is WEIGHTS


def test_tensors_of_no_elements():
    layer = holder(torch.ones(0, 3))
    guard = Guard([layer])
    assert guard.check() is SAME
    layer.held = torch.ones(0, 3)
    assert guard.check() is WEIGHTS
    layer.held = torch.ones(0, 4)
    assert guard.check() is STRUCTURE


@pytest.mark.parametrize(
    "fill",
    [
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.load_state_dict(Layer().state_dict(), assign=True),
        lambda m: setattr(m, "weight", Layer().weight),
    ],
)
def test_models_on_the_meta_device(fill):
    with torch.device("meta"):
        layer = Layer()
    guard = Guard(layer.modules())
    assert guard.watches and guard.check() is SAME
    layer.weight.data = layer.weight.data.clone()
    assert guard.check() is WEIGHTS
    fill(layer)
    assert guard.check() is STRUCTURE
    assert Guard(layer.modules()).watches


def test_inference_tensors():
    with torch.inference_mode():
        layer = Layer()
    guard = Guard(layer.modules())
    assert guard.check() is SAME
    with torch.inference_mode():
        layer.weight.mul_(2)
    assert guard.check() is WEIGHTS
    layer.bias = None
    assert guard.check() is STRUCTURE
