"""One list of bad calls, the same sentence from every backend and from fake tensors.

After each bad call a good one still gives the same bits.
"""

import re
from math import inf

import cases
import pytest
import torch
from bad_calls import (
    BAD_CALLS,
    NAMES,
    call_reference,
    fill,
    good_call,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from mnv2_kernels import FoldedWeights, inverted_residual

OP = torch.ops.mnv2.inverted_residual.default


def converted(call: dict, convert) -> list:
    return [convert(v) if isinstance(v, torch.Tensor) else v for v in call.values()]


def call_fake(call: dict) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return OP(*converted(call, mode.from_tensor))


CALLERS = {
    "reference": call_reference,
    "cpu": lambda call: OP(*call.values()),
    "meta": lambda call: OP(*converted(call, lambda t: t.to("meta"))),
    "fake": call_fake,
}


@pytest.mark.parametrize("caller", ["reference", "meta", "fake", *cases.kernel_backends()])
def test_bad_calls(caller):
    assert len(BAD_CALLS) >= 100
    before = CALLERS[caller](good_call())
    wrong = []
    for error, sentence, changes in BAD_CALLS:
        changes = fill(changes)
        try:
            CALLERS[caller](good_call() | changes)
            wrong.append(f"accepted: {sentence}")
        except error as raised:
            if not str(raised).startswith(f"inverted_residual: {sentence}"):
                wrong.append(f"{raised}\n  expected: {sentence}")
        except Exception as raised:
            wrong.append(f"{type(raised).__name__}: {raised}\n  expected: {sentence}")
        after = CALLERS[caller](good_call())
        if caller in ("reference", "cpu"):
            assert torch.equal(after, before), sentence
    assert not wrong, f"{len(wrong)} of {len(BAD_CALLS)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_two_devices(kernel_backend, name):
    call = good_call()
    call[name] = call[name].to("meta")
    named = "w_expand" if name == "x" else name
    with pytest.raises(ValueError, match=f"^inverted_residual: {named} must be on the device of x"):
        CALLERS[kernel_backend](call)


# How a tensor becomes one of another kind, which error that is, and what the sentence names.
OTHER_KINDS = {
    "sparse": (lambda t: t.to_sparse(), "SparseCPU"),
    "sparse rows": (lambda t: t.reshape(len(t), -1).to_sparse_csr(), "SparseCsr"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "QuantizedCPU"),
    "nested": (lambda t: torch.nested.as_nested_tensor([t, t]), "Nested"),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        "inverted_residual",
    ),
    "mkldnn": (lambda t: t.to_mkldnn(), "Mkldnn"),
    "masked": (lambda t: torch.masked.masked_tensor(t, t > 0), "inverted_residual"),
    "uninitialised": (lambda t: nn.UninitializedParameter(), "uninitialized parameter"),
    "fake": (lambda t: FakeTensorMode().from_tensor(t), "FakeTensor"),
    "8 bits": (lambda t: t.to(torch.float8_e4m3fn), "must "),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_tensor(kernel_backend, kind, name):
    """Whatever PyTorch makes of them, it is an error, and the next call gives the same bits."""
    convert, sentence = OTHER_KINDS[kind]
    before = CALLERS[kernel_backend](good_call())
    call = good_call()
    call[name] = convert(call[name])
    errors = (TypeError, ValueError, NotImplementedError, RuntimeError, AssertionError)
    with pytest.raises(errors, match=sentence):
        CALLERS[kernel_backend](call)
    assert torch.equal(CALLERS[kernel_backend](good_call()), before)


@pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension")
@pytest.mark.parametrize("left", [0, 1, -1], ids=["freed", "one byte", "all but one byte"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_tensors_without_their_memory(left, channels_last):
    """Their storage was freed or made smaller, as sharding of parameters does."""
    before = CALLERS["cpu"](good_call())
    for name in NAMES:
        call = good_call()
        if channels_last:
            call["x"] = call["x"].contiguous(memory_format=torch.channels_last)
        storage, nbytes = call[name].untyped_storage(), call[name].nbytes
        storage.resize_(left % nbytes)
        sentence = (
            f"^inverted_residual: {name} must lie inside its storage, which has been resized to"
            f" {left % nbytes} bytes of {nbytes}$"
        )
        with pytest.raises(ValueError, match=sentence):
            CALLERS["cpu"](call)
        # A view beyond the end, of a storage that has become too small for it alone.
        call = good_call()
        wide = torch.cat([call[name].flatten()] * 2)
        call[name] = wide[call[name].numel() :].view(call[name].shape)
        wide.untyped_storage().resize_(nbytes)
        with pytest.raises(ValueError, match=f"{nbytes} bytes of {2 * nbytes}$"):
            CALLERS["cpu"](call)
        assert torch.equal(CALLERS["cpu"](good_call()), before)


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.numpy().copy()
    numbers.flags.writeable = False
    return torch.from_numpy(numbers)


class Own(torch.Tensor):
    """A subclass that changes nothing."""


DENSE = {
    "read-only memory": read_only,
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "functional": torch._to_functional_tensor,
    "parameter": nn.Parameter,
    "buffer": nn.Buffer,
    "subclass": lambda t: t.as_subclass(Own),
}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of their own."""
    if torch._is_functional_tensor(tensor):
        tensor = torch._from_functional_tensor(tensor)
    return torch.empty(tensor.shape).copy_(tensor.detach())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_dense_tensors_of_other_origin(kernel_backend, name):
    """They give what the same numbers in memory of their own give, and stay as they were."""
    for kind, convert in DENSE.items():
        call = good_call()
        other = convert(call[name])
        numbers = plain(other)
        y = CALLERS[kernel_backend](call | {name: other})
        right = CALLERS[kernel_backend](call | {name: numbers})
        assert torch.equal(plain(y), right), kind
        assert torch.equal(plain(other), numbers), kind


BACKWARD = torch.ops.mnv2.inverted_residual_backward.default


def bad_backward_calls():
    grad = torch.ones(2, 8, 6, 7)
    call = list(good_call().values())
    everything = [True] * 7
    for shape in ((2, 8, 6, 6), (2, 8, 42), (1, 8, 6, 7), (), (2, 9, 6, 7)):
        sentence = f"grad_y must have shape (2, 8, 6, 7), got {shape}"
        yield ValueError, sentence, [torch.ones(shape), *call, everything]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        sentence = "grad_y must be a dense floating-point tensor, got "
        yield TypeError, sentence, [grad.to(dtype), *call, everything]
    for i, name in ((2, "b_expand"), (4, "b_dw"), (6, "b_project")):
        sentence = f"needs_grad must be False for {name}, which is None"
        yield ValueError, sentence, [grad, *call[:i], None, *call[i + 1 :], everything]
    for error, sentence, changes in BAD_CALLS[::4]:
        changed = good_call() | fill(changes)
        yield error, sentence, [grad, *changed.values(), everything]


def test_bad_calls_of_the_backward_op():
    good = [torch.ones(2, 8, 6, 7), *good_call().values(), [True] * 7]
    before = BACKWARD(*good)
    calls = list(bad_backward_calls())
    for error, sentence, arguments in calls:
        with pytest.raises(error, match=f"^inverted_residual: {re.escape(sentence)}"):
            BACKWARD(*arguments)
    assert all(map(torch.equal, BACKWARD(*good), before))
    if "cpu" in cases.kernel_backends():
        lost = torch.ones(2, 8, 6, 7)
        lost.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="^inverted_residual: grad_y must lie inside its stor"):
            BACKWARD(lost, *good[1:14], (-inf, inf), [True] * 7)


@pytest.mark.parametrize("missing", ["x", "w_dw", "w_project"])
def test_tensors_that_must_be_there(kernel_backend, missing):
    with pytest.raises((ValueError, TypeError), match=missing):
        CALLERS[kernel_backend](good_call() | {missing: None})


@pytest.mark.parametrize("shape", [(1, 8, 2**30, 2**29), (2**40, 8, 6, 7), (1, 8, 2**59, 1)])
def test_results_beyond_all_memory(kernel_backend, shape):
    """x holds one float; the result would hold up to 2**62 of them."""
    call = good_call() | {"x": torch.zeros(1).as_strided(shape, (0, 0, 0, 0))}
    with pytest.raises(RuntimeError):
        CALLERS[kernel_backend](call)
    CALLERS[kernel_backend](good_call())


def test_backends_that_cannot_run(kernel_backend):
    call = good_call()
    x, weights = call["x"], FoldedWeights(*(call[name] for name in NAMES[1:]))
    with pytest.raises(ValueError, match="backend must be one of .*reference, got 'gpu'"):
        inverted_residual(x, weights, backend="gpu")
    sentence = (
        f"backend '{kernel_backend}' cannot run here: x must be float32, float16 or bfloat16,"
        " got torch.float64"
    )
    with pytest.raises(RuntimeError, match=sentence):
        inverted_residual(x.double(), weights.to(torch.float64), backend=kernel_backend)
    assert inverted_residual(x, weights, backend=kernel_backend).shape == x.shape
