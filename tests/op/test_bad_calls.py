"""One list of bad calls, the same sentence from every backend and from fake tensors.

After each bad call a good one still gives the same bits.
"""

import re
from math import inf, nan

import cases
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mnv2_kernels import FoldedWeights, inverted_residual

NAMES = ("x", "w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
BIASES = ("b_expand", "b_dw", "b_project")
CLIPS = ("clip_expand", "clip_dw", "clip_project")
OP = torch.ops.mnv2.inverted_residual.default


def good_call() -> dict:
    """The op's arguments: 8 channels in and out, 24 hidden."""
    randn = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 6, 7), (8, 24), (24,), (3, 3, 24), (24,), (24, 8), (8,))
    tensors = (torch.randn(shape, generator=randn) for shape in shapes)
    return {
        **dict(zip(NAMES, tensors, strict=True)),
        "stride": 1,
        "padding": (1, 1, 1, 1),
        "dilation": 1,
        "residual": False,
        **dict.fromkeys(CLIPS, (0.0, 6.0)),
    }


def bad_shapes():
    for shape in ((), (8,), (8, 6), (8, 6, 7), (1, 2, 8, 6, 7)):
        yield f"x must have shape (N, C_in, H, W), got {shape}", {"x": shape}
    for shape in ((), (8,), (24, 8), (8, 24, 1), (24, 8, 1, 1), (8, 23), (9, 24)):
        yield f"w_expand must have shape (C_in=8, C_hidden=24), got {shape}", {"w_expand": shape}
    yield "w_expand must have shape (C_in=9, C_hidden=24), got (8, 24)", {"x": (2, 9, 6, 7)}
    yield "w_expand must have shape (C_in=8, C_hidden=25), got (8, 24)", {"w_dw": (3, 3, 25)}
    wrong_kernels = ((9, 24), (24, 1, 3, 3), (24, 3, 3), (3, 5, 24), (5, 3, 24), (3, 3, 24, 1))
    for shape in (*wrong_kernels, (1, 1, 24), (2, 2, 24), (4, 4, 24), (7, 7, 24), (0, 0, 24), ()):
        sentence = f"w_dw must have shape (k, k, C_hidden) with k 3 or 5, got {shape}"
        yield sentence, {"w_dw": shape}
    for shape in ((), (24,), (8, 24), (24, 8, 1), (8, 24, 1, 1), (25, 8), (0, 8)):
        yield f"w_project must have shape (C_hidden=24, C_out), got {shape}", {"w_project": shape}
    for name, letter, channels in zip(
        BIASES, ("hidden", "hidden", "out"), (24, 24, 8), strict=True
    ):
        for shape in ((), (channels + 1,), (0,), (1,), (channels, 1), (1, channels)):
            yield f"{name} must have shape (C_{letter}={channels},), got {shape}", {name: shape}
    yield "b_expand must be None where w_expand is None", {"w_expand": None}
    yield (
        "w_dw must have shape (3, 3, C_in=8) where w_expand is None, got (3, 3, 24)",
        {"w_expand": None, "b_expand": None},
    )
    for channels in ((0, 24, 8), (8, 0, 8), (8, 24, 0)):
        c_in, hidden, c_out = channels
        yield (
            f"every channel count must be at least 1, got C_in={c_in}, C_hidden={hidden}, C_out",
            {"x": (2, c_in, 6, 7), "w_expand": (c_in, hidden), "b_expand": (hidden,)}
            | {"w_dw": (3, 3, hidden), "b_dw": (hidden,)}
            | {"w_project": (hidden, c_out), "b_project": (c_out,)},
        )


def bad_settings():
    for stride in (0, 3, -1, 4, 2**40, -(2**63)):
        yield f"stride must be 1 or 2, got {stride}", {"stride": stride}
    for dilation in (0, 3, -1, 2**40, -(2**63)):
        yield f"dilation must be 1 or 2, got {dilation}", {"dilation": dilation}
    for i in range(4):
        for value in (-1, 3, 2**62):
            padding = [value if i == j else 1 for j in range(4)]
            sentence = "padding must be 4 integers (top, left, bottom, right) from 0 to 2"
            yield f"{sentence}, got {padding}", {"padding": padding}
    yield (
        "padding must be 4 integers (top, left, bottom, right) from 0 to 4, got [5, 0, 0, 0]",
        {"padding": (5, 0, 0, 0), "dilation": 2},
    )
    for padding in ([], [1], [1, 1], [1, 1, 1], [1] * 5):
        yield "padding must be 4 integers (top, left, bottom, right)", {"padding": padding}
    for height, width in ((0, 7), (6, 0), (0, 0), (2, 7), (6, 2), (1, 1)):
        yield (
            "x must be large enough for one output row and column,"
            f" got {height}x{width} with padding [0, 0, 0, 0]",
            {"x": (2, 8, height, width), "padding": (0, 0, 0, 0)},
        )
    yield "x must be large enough", {"x": (2, 8, 2, 2), "dilation": 2}
    for name in CLIPS:
        for clip in ((6.0, 0.0), (nan, 6.0), (0.0, nan), (nan, nan), (inf, -inf), (), (0.0,) * 3):
            yield f"{name} must be (lower, upper) with lower <= upper, got [", {name: clip}
    residual = {"residual": True}
    yield "residual needs x and the result to have one shape", residual | {"stride": 2}
    yield (
        "residual needs x and the result to have one shape, got (2, 8, 6, 7) and (2, 8, 4, 7)",
        residual | {"padding": (0, 1, 0, 1)},
    )
    yield (
        "residual needs x and the result to have one shape, got (2, 8, 6, 7) and (2, 9, 6, 7)",
        residual | {"w_project": (24, 9), "b_project": None},
    )
    yield "residual needs x", residual | {"padding": (2, 2, 2, 2)}


def bad_dtypes():
    call = good_call()
    for name in NAMES:
        for dtype in (torch.int32, torch.int8, torch.bool, torch.complex64):
            sentence = f"{name} must be a dense floating-point tensor, got "
            yield sentence, {name: call[name].to(dtype)}
    for name in NAMES[1:]:
        for dtype in (torch.float64, torch.bfloat16):
            yield f"{name} must have the dtype of x, ", {name: call[name].to(dtype)}
    yield "w_expand must have the dtype of x, ", {"x": call["x"].half()}
    yield "w_dw must have the dtype of x, ", {"x": call["x"].double(), "w_expand": None}


def fill(changes: dict) -> dict:
    return {
        name: torch.zeros(value) if name in NAMES and isinstance(value, tuple) else value
        for name, value in changes.items()
    }


BAD_CALLS = [
    *((ValueError, *call) for call in bad_shapes()),
    *((ValueError, *call) for call in bad_settings()),
    *((TypeError, *call) for call in bad_dtypes()),
]


def call_reference(call: dict) -> torch.Tensor:
    call = dict(call)
    x = call.pop("x")
    fields = (*NAMES[1:], *CLIPS)
    weights = FoldedWeights(**{name: call.pop(name) for name in fields})
    return inverted_residual(x, weights, backend="reference", **call)


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
def test_tensors_without_their_memory(left, channels_last, cases_checked):
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
        # A view behind the end, of a storage that has become too small for it alone.
        call = good_call()
        wide = torch.cat([call[name].flatten()] * 2)
        call[name] = wide[call[name].numel() :].view(call[name].shape)
        wide.untyped_storage().resize_(nbytes)
        with pytest.raises(ValueError, match=f"{nbytes} bytes of {2 * nbytes}$"):
            CALLERS["cpu"](call)
        assert torch.equal(CALLERS["cpu"](good_call()), before)
    cases_checked(2 * len(NAMES))


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
def test_dense_tensors_of_other_origin(kernel_backend, name, cases_checked):
    """They give what the same numbers in memory of their own give, and stay as they were."""
    for kind, convert in DENSE.items():
        call = good_call()
        other = convert(call[name])
        numbers = plain(other)
        y = CALLERS[kernel_backend](call | {name: other})
        right = CALLERS[kernel_backend](call | {name: numbers})
        assert torch.equal(plain(y), right), kind
        assert torch.equal(plain(other), numbers), kind
    cases_checked(len(DENSE))


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


def test_bad_calls_of_the_backward_op(cases_checked):
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
    cases_checked(len(calls) + 1)


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
