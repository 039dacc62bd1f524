"""Random networks: blocks and layers in a row, nested and called in many ways.

A `Network` says how to build a model, and knows which of its blocks `fuse` must replace and which
must be declined.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from cases import Expected
from foreign_blocks import conv_norm_act
from hypothesis import assume
from hypothesis import strategies as st
from random_blocks import (
    BESIDE,
    BLOCKS,
    CHAINS,
    CHANGE_SIZE,
    HARMLESS,
    KEEP_CHANNELS,
    RELATIVES,
    SPOILING,
    Piece,
    build_piece,
    is_spoiled,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """Pieces in a row, how they are nested, what calls them and what follows."""

    seed: int
    channels: int
    pieces: tuple[Piece, ...]
    nesting: str = "flat"
    form: str = "sequential"
    head: str = "none"
    dtype: str = "float32"


class Net(nn.Module):
    """Features, and what makes an answer of them."""

    def __init__(self, features: nn.Module, head: nn.Module):
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x):
        return self.head(self.features(x))


class Looped(nn.Module):
    """Calls the children of its features one by one."""

    def __init__(self, features: nn.Sequential, head: nn.Module):
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x):
        for layer in self.features:
            x = layer(x)
        return self.head(x)


class Sliced(Looped):
    """Cuts its features in two, as segmentation models do."""

    def forward(self, x):
        middle = len(self.features) // 2
        return self.head(self.features[middle:](self.features[:middle](x)))


class Residual(nn.Module):
    """Adds its input to what its function makes of it."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.fn = function

    def forward(self, x):
        return x + self.fn(x)


def _nest(pieces: list[list[nn.Module]], nesting: str) -> nn.Sequential:
    every = [layer for piece in pieces for layer in piece]
    wrapped = [nn.Sequential(*piece) for piece in pieces]
    middle = len(pieces) // 2
    match nesting:
        case "each":
            return nn.Sequential(*wrapped)
        case "halves":
            halves = [layer for p in pieces[:middle] for layer in p], pieces[middle:]
            return nn.Sequential(nn.Sequential(*halves[0]), *(m for p in halves[1] for m in p))
        case "deep":
            return nn.Sequential(nn.Sequential(*wrapped[:middle]), nn.Sequential(*wrapped[middle:]))
    return nn.Sequential(*every)


def _head(kind: str, channels: int) -> list[nn.Module]:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return {
        "none": [],
        "pool": pool,
        "classifier": [*pool, nn.Dropout(0.1), nn.Linear(channels, 5)],
        "convolution": [*conv_norm_act(channels, 18), *pool, nn.Linear(18, 3, bias=False)],
        "two layers": [*pool, nn.Linear(channels, 11), nn.Hardswish(), nn.Linear(11, 3)],
    }[kind]


def keeps_shape(network: Network) -> bool:
    pieces = network.pieces
    sized = all(p.stride == 1 and p.kind not in CHANGE_SIZE for p in pieces)
    return sized and pieces[-1].channels == network.channels


def repeats_last(network: Network) -> bool:
    """Whether the last piece is called twice."""
    before = network.pieces[-2].channels if len(network.pieces) > 1 else network.channels
    last = network.pieces[-1]
    return network.form == "twice" and last.channels == before and last.kind in BLOCKS | RELATIVES


def build(network: Network) -> nn.Module:
    """The model, as it is constructed: in training mode, in float32."""
    torch.manual_seed(network.seed)
    channels, pieces = network.channels, []
    for piece in network.pieces:
        pieces.append(build_piece(channels, piece))
        channels = piece.channels
    if repeats_last(network):
        pieces.append(pieces[-1])
    features = _nest(pieces, network.nesting)
    head = _head(network.head, channels)
    if network.form == "residual" and keeps_shape(network):
        return nn.Sequential(Residual(features), *head)
    forms = {"module": Net, "looped": Looped, "sliced": Sliced}
    if network.form in forms:
        return forms[network.form](features, nn.Sequential(*head))
    return nn.Sequential(features, *head) if network.nesting == "deep" else features.extend(head)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in evaluation mode, with batch norms that fit x and make both clips act, none of
    which magnifies rounding errors.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        if norm.weight is not None:
            norm.weight.uniform_(1, 3)
            norm.bias.normal_(1, 1)
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.1)
    return model.eval()


def expected(truth: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Expected:
    """What results in a dtype are judged by: the truth, and the worst that the layers gave.

    A result of few numbers can be exact by luck; the layers count as off by two units at least.
    """
    least = 2 * torch.finfo(dtype).eps * truth.abs().max().item() if truth.numel() else 0.0
    errors = [(y.double() - truth).abs() for y in layers if y.numel()]
    return Expected(
        truth,
        dtype,
        max((error.max().item() for error in errors), default=0.0),
        max([least, *(error.mean().item() for error in errors)]),
    )


def expected_states(network: Network) -> Counter:
    """How many blocks are in each of the states that `explain` knows, once the model is fused.

    "either" is fused or declined: a block whose expansion is no such layer may have a depthwise and
    a projection that are a block of their own. "loose" is declined or not told of: layers among
    others, whose depthwise is then outside of all blocks.
    """
    found: Counter = Counter()
    for piece in network.pieces:
        if piece.kind == "own":
            found["plain" if is_spoiled(piece) else "fused"] += 1
        elif piece.kind == "kuangliu" or (piece.kind in BLOCKS and is_spoiled(piece)):
            found["either"] += 1
        elif piece.kind in RELATIVES:
            found["declined"] += 1
        elif piece.kind in CHAINS and is_spoiled(piece):
            found["loose"] += 1
        elif piece.kind in BLOCKS | CHAINS:
            found["fused"] += 1
    return found


def are_expected(states: Counter, network: Network) -> bool:
    """Whether the network can have the states that `explain` reports."""
    expected = expected_states(network)
    either, loose = expected.pop("either", 0), expected.pop("loose", 0)
    more = {name: states[name] - expected[name] for name in states.keys() | expected.keys()}
    fused, declined = more.pop("fused", 0), more.pop("declined", 0)
    if any(more.values()) or not 0 <= fused <= either or declined < 0:
        return False
    return either <= fused + declined <= either + loose


def block_calls(network: Network) -> tuple[int, int]:
    """How many blocks run fused in one call of the model, at least and at most.

    Whoever calls the children of a Sequential one by one, or cuts it within a block, gets layers.
    """
    last = network.pieces[-1]
    again = repeats_last(network) and expected_states(replace(network, pieces=(last,)))["fused"]
    states = expected_states(network)
    fused = states["fused"] + int(again)
    # A last piece that is either counts twice at most.
    most = fused + 2 * states["either"]
    cut = network.form in ("looped", "sliced")
    # A clip after a block belongs to it.
    following = (*(piece.kind for piece in network.pieces[1:]), "")
    chains = tuple(
        piece
        for piece, after in zip(network.pieces, following, strict=True)
        if piece.kind in CHAINS or after == "relu"
    )
    return fused - cut * expected_states(replace(network, pieces=chains))["fused"], most


CHANGES = [
    (kind, into)
    for table in (HARMLESS, SPOILING)
    for kind, choices in table.items()
    for into in choices
]
KINDS = (*BLOCKS, *CHAINS) * 3 + (*RELATIVES, *BESIDE)


@st.composite
def pieces(draw, channels: int, kinds=KINDS, changes=CHANGES) -> Piece:
    kind = draw(st.sampled_from(kinds))
    made = channels
    if kind not in KEEP_CHANNELS and draw(st.booleans()):
        made = draw(st.integers(2, 20))
    if kind in BESIDE:
        return Piece(kind, made)
    stride = draw(st.sampled_from((1, 1, 2)))
    change = None
    if changes and kind not in RELATIVES and draw(st.integers(0, 2)) == 0:
        change = (*draw(st.sampled_from(changes)), draw(st.integers(0, 2)))
    return Piece(
        kind,
        channels if kind == "no-flag" else made,
        stride=1 if kind == "no-flag" else stride,
        kernel=draw(st.sampled_from((3, 3, 5))),
        ratio=draw(st.integers(2, 4) if kind in CHAINS else st.integers(1, 4)),
        dilation=draw(st.sampled_from((1, 1, 1, 2))) if stride == 1 else 1,
        change=change,
    )


@st.composite
def networks(draw, kinds=KINDS, changes=CHANGES, dtypes=("float32",) * 7 + ("bfloat16",)):
    first = channels = draw(st.integers(2, 12))
    made = []
    for _ in range(draw(st.integers(1, 5))):
        made.append(draw(pieces(channels, kinds, changes)))
        channels = made[-1].channels
    assume(any(piece.kind not in KEEP_CHANNELS for piece in made))
    return Network(
        seed=draw(st.integers(0, 999)),
        channels=first,
        pieces=tuple(made),
        nesting=draw(st.sampled_from(("flat", "each", "halves", "deep"))),
        form=draw(
            st.sampled_from(("sequential", "module", "looped", "sliced", "residual", "twice"))
        ),
        head=draw(
            st.sampled_from(("none", "none", "pool", "classifier", "convolution", "two layers"))
        ),
        dtype=draw(st.sampled_from(dtypes)),
    )
