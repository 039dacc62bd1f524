"""docs/api.md, from the docstrings of the public names and the schemas of the torch ops."""

import inspect
import re
import textwrap
from collections.abc import Iterator

import torch

import mnv2_kernels as mk
from mnv2_kernels.fuse.explain import Report, Row
from mnv2_kernels.network.plan import CapturedPlan, Plan

_INTRODUCTION = """\
# API

Every public name of `mnv2_kernels`, from its docstring: `help(mk.fuse)` says the same in Python.
`python -m benchmarks.report` writes this page. `mk.__version__` is the version, and
`mnv2_kernels.types` has the types of results, for annotations.

The tests run all examples. The examples begin with:

```python
import torch

import mnv2_kernels as mk
```
"""
# What public functions return and users do not make themselves.
_RETURNED = (Plan, CapturedPlan, Report, Row)
# The ops that a graph of a user may hold. All others are internal.
_OPS = {
    "inverted_residual": """\
The op that all modules call; `mk.inverted_residual` is the function for people. It stays one node
in graphs of `torch.compile` and `torch.export`.

- `x`: (N, C_in, H, W), any strides.
- `w_expand`: (C_in, C_hidden), or None for a block without expansion.
- `w_dw`: (k, k, C_hidden) with k 3 or 5. `w_project`: (C_hidden, C_out).
- `b_expand`, `b_dw`, `b_project`: 1-D, in the dtype of x or float32, or None.
- `stride`, `dilation`: 1 or 2. `padding`: (top, left, bottom, right).
- `clip_expand`, `clip_dw`, `clip_project`: (lower, upper); (-inf, inf) clips nothing.

Returns (N, C_out, H_out, W_out), dense channels_last, in the dtype of x: float32, bfloat16 or
float16 on a kernel. Raises ValueError or TypeError where an argument breaks this contract, and
RuntimeError where no kernel for the device has been built.

Example:
    >>> w = mk.fold(mk.InvertedResidual(16, 24))
    >>> x = torch.randn(1, 16, 28, 28)
    >>> settings = 1, (1, 1, 1, 1), 1, False  # stride, padding, dilation, residual
    >>> torch.ops.mnv2.inverted_residual(x, *w.tensors(), *settings, *w.clips()).shape
    torch.Size([1, 24, 28, 28])
""",
    "mbconv": """\
The same for all other blocks; `mk.inverted_residual` calls it for weights that have a curve or a
gate, and for those that `inverted_residual` does not take. x and the first six weights, `stride`,
`padding`, `dilation` and `residual` are those of `inverted_residual`.

- `w_dw`: (k, k, C_hidden) with k 3, 5 or 7; or (k, k, C_in, C_hidden) with k 1, 3 or 5, which is a
  convolution of all channels in place of expansion and depthwise, without w_expand and gate.
- `dilation`: at least 1, and `dilation * (k - 1)` at most 144.
- `w_squeeze`: (C_hidden, R), `w_excite`: (R, C_hidden), or None without a squeeze-excite.
- `b_squeeze`, `b_excite`: 1-D, in the dtype of x or float32, or None.
- `curves`: what follows expansion, depthwise, projection and squeeze: 0 a clip, 1 hardswish,
  2 silu, 3 gelu, 4 gelu_tanh.
- `bounds`: lower and upper of each of the four clips, infinite in place of a curve.
- `scale`: what the excitation goes through: 0 sigmoid, 1 hardsigmoid.

Returns and raises the same; where there is no kernel for the device, it computes layer by layer.

Example:
    >>> w = mk.fold(mk.InvertedResidual(16, 24))
    >>> x, no_gate = torch.randn(1, 16, 28, 28), (None,) * 4
    >>> settings = 1, (1, 1, 1, 1), 1, False  # stride, padding, dilation, residual
    >>> curves, bounds = (1, 1, 0, 0), (-torch.inf, torch.inf) * 4
    >>> torch.ops.mnv2.mbconv(x, *w.tensors(), *no_gate, *settings, curves, bounds, 0).shape
    torch.Size([1, 24, 28, 28])
""",
    "run_plan": """\
A whole network of fixed size as one op on a CPU; a `Plan` calls it. `weights`, `program` and
`bounds` are internal to the plan, and are checked before they are used. A graph that holds a plan
holds this op.

Returns what the last layer gives, in the dtype of x. Raises ValueError or TypeError where x does
not fit the program, and RuntimeError where the kernels have not been built.

Example:
    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> plan = mk.plan(mk.mobilenet_v2().eval(), (3, 96, 96))
    >>> graph = make_fx(plan)(torch.randn(1, 3, 96, 96))
    >>> [node.target for node in graph.graph.nodes if "mnv2" in str(node.target)]
    [<OpOverload(op='mnv2.run_plan', overload='default')>]
""",
}
_LISTS = ("Args", "Raises", "Warns")


def api_page() -> str:
    """The page: public names in alphabetical order, what they return, the torch ops."""
    names = sorted(mk.__all__, key=str.lower)
    parts = [_INTRODUCTION, *(_entry(f"mk.{name}", getattr(mk, name)) for name in names)]
    parts += [_entry(kind.__name__, kind) for kind in _RETURNED]
    for name, text in _OPS.items():
        call = _wrapped(str(getattr(torch.ops.mnv2, name).default._schema))
        parts.append(_part(f"torch.ops.mnv2.{name}", call, text))
    return "\n".join(parts)


def _entry(name: str, value: object) -> str:
    made_by_user = value not in _RETURNED
    entry = _part(name, _call(name, value) if made_by_user else None, inspect.getdoc(value))
    if not inspect.isclass(value):
        return entry
    methods = (
        _part(f"{value.__name__}.{method}", call, text, level=3)
        for method, call, text in _methods(value)
    )
    return "\n".join([entry, *methods])


def _methods(kind: type) -> Iterator[tuple[str, str | None, str]]:
    """(name, call, docstring) of what a class defines itself for its users."""
    for name, member in vars(kind).items():
        if name.startswith("_") and name != "__call__" or not member.__doc__:
            continue
        if isinstance(member, property):
            yield name, None, inspect.getdoc(member)
        elif inspect.isfunction(member):
            yield name, _call(name, member), inspect.getdoc(member)


def _call(name: str, function: object) -> str:
    """The signature without types, which the docstring says in words."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]
    signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(inspect.Signature(parameters)))
    return _wrapped(name + signature)


def _wrapped(call: str) -> str:
    return textwrap.fill(call, 96, subsequent_indent=" " * (call.index("(") + 1))


def _part(name: str, call: str | None, text: str, level: int = 2) -> str:
    shown = [] if call is None else [f"```text\n{call}\n```\n"]
    return "\n".join([f"{'#' * level} `{name}`\n", *shown, _rendered(text)])


def _rendered(docstring: str) -> str:
    """Markdown of a docstring: its lists of arguments and errors, its examples, the rest as is."""
    parts = []
    for block in re.split(r"\n(?=\S)", docstring.strip()):
        heading, _, body = block.partition(":\n")
        body = textwrap.dedent(body).rstrip()
        if heading in _LISTS and body:
            items = re.split(r"\n(?=\S)", body)
            parts.append(f"\n{heading}:\n\n" + "\n".join(map(_item, items)) + "\n")
        elif heading == "Returns":
            parts.append(f"\nReturns: {body}\n")
        elif heading == "Example":
            parts.append(f"\n```pycon\n{body}\n```\n")
        else:
            parts.append(block)
    text = "\n".join(parts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _item(item: str) -> str:
    names, _, text = item.partition(":")
    named = ", ".join(f"`{name}`" for name in names.split(", "))
    return f"- {named}:{' ' + ' '.join(text.split())}"
