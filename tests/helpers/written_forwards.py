"""Random modules around one inverted residual, their forwards written as source and executed."""

import linecache
import random
from dataclasses import dataclass

import torch
from forwards import conv_norm_act
from torch import nn
from torch.nn import functional as F

# What may be done to a tensor v between two stages. Every line keeps its number of channels.
# x is the module's input; the number next to an edit is what it adds to height and width.
EDITS = {
    "pad": ("F.pad(v, (1, 1, 1, 1))", 2),
    "pad one side": ("F.pad(v, (0, 1, 0, 1))", 1),
    "crop by padding": ("F.pad(v, (-1, 0, 0, -1))", -1),
    "scale": ("v * 0.5", 0),
    "scale by a parameter": ("v * self.scale", 0),
    "negate": ("-v", 0),
    "shift": ("v + 0.25", 0),
    "clip": ("v.clamp(-0.5, 1.5)", 0),
    "relu6": ("F.relu6(v)", 0),
    "relu in place": ("F.relu(v + 0, inplace=True)", 0),
    "cat and halve": ("torch.cat([v, v * 2], 1)[:, ::2]", 0),
    "second input": ("v if other is None else v * other", 0),
    "identity": ("self.same(v)", 0),
    "clone": ("v.clone()", 0),
    "contiguous": ("v.contiguous()", 0),
    "dropout": ("F.dropout(v, 0.25, self.training)", 0),
    "dropout module": ("self.drop(v)", 0),
    "slice": ("v[:, :, 1:, 1:]", -1),
    "permute and back": ("v.permute(0, 2, 3, 1).permute(0, 3, 1, 2)", 0),
    "permute, flip and back": ("v.permute(0, 2, 3, 1).flip(3).permute(0, 3, 1, 2)", 0),
    "reshape and back": ("v.flatten(2).reshape(v.shape)", 0),
    "add the mean of x": ("v + x.mean((1, 2, 3), keepdim=True)", 0),
    "add the first channel of x": ("v + F.adaptive_avg_pool2d(x, v.shape[2:])[:, :1]", 0),
    "by shape": ("v * 2 if v.shape[0] == 1 else v", 0),
    "by mode": ("v if self.training else v + 1", 0),
    "shuffle": ("F.channel_shuffle(v, 2)", 0),
    "gate": ("v * torch.sigmoid(v.mean((2, 3), keepdim=True))", 0),
    "to and fro": ("v.to(memory_format=torch.channels_last)", 0),
}


class Children(nn.Module):
    """Everything a written forward may use."""

    def __init__(self, stride: int, written_out: bool):
        super().__init__()
        self.conv1, self.bn1 = conv_norm_act(8, 24, act=None)
        self.conv2, self.bn2 = conv_norm_act(24, 24, 3, stride, 24, act=None)
        self.conv3, self.bn3 = conv_norm_act(24, 8, act=None)
        if not written_out:
            layers = [self.conv1, self.bn1, nn.ReLU6(), self.conv2, self.bn2, nn.ReLU6()]
            self.conv = nn.Sequential(*layers, self.conv3, self.bn3)
            for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
                delattr(self, name)


@dataclass(frozen=True)
class Written:
    """A module, its source, and whether nothing was done around its stages."""

    module: nn.Module
    source: str
    is_block: bool
    takes_other: bool


def write(seed: int, most_edits: int = 3) -> Written:
    """A block with up to `most_edits` edits before, between and after its stages."""
    rng = random.Random(seed)
    stride, written_out = rng.choice((1, 1, 2)), rng.random() < 0.6
    if written_out:
        stages = ["self.bn1(self.conv1(v))", "F.relu6(v)", "self.bn2(self.conv2(v))"]
        stages += [rng.choice(("F.relu6(v)", "F.relu6(v, inplace=True)"))]
        stages += ["self.bn3(self.conv3(v))"]
        depthwise = 2
    else:
        stages = rng.choice((["self.conv(v)"], ["self.conv[:3](v)", "self.conv[3:](v)"]))
        depthwise = len(stages) - 1
    steps = [(stage, "") for stage in stages]
    for _ in range(rng.randint(0, most_edits)):
        name = rng.choice(list(EDITS))
        steps.insert(rng.randint(0, len(steps)), (EDITS[name][0], name))
    size = 12
    lines = ["v = x"]
    for step, name in steps:
        lines.append(f"v = {step}")
        size += EDITS[name][1] if name else 0
        if stride == 2 and step == stages[depthwise]:
            size = (size + 1) // 2
    edits = {name for _, name in steps if name}
    adds = rng.random() < 0.7
    if adds and size == 12:
        lines.append(rng.choice(("v = x + v", "v = v + x", "v += x", "v = torch.add(v, x)")))
    elif adds:
        lines.append(f"v = v + F.adaptive_avg_pool2d(x, ({size}, {size}))")
    takes_other = "second input" in edits
    parameters = "x, other=None" if takes_other else "x"
    body = "".join(f"        {line}\n" for line in lines)
    source = f"class Written(Children):\n    def forward(self, {parameters}):\n{body}"
    source += "        return v\n"
    module = _execute(source, f"<written forward {seed}>")(stride, written_out)
    if "scale by a parameter" in edits:
        module.scale = nn.Parameter(torch.tensor(0.75))
    if "identity" in edits:
        module.same = nn.Identity()
    if "dropout module" in edits:
        module.drop = nn.Dropout(0.25)
    is_block = not edits and not (adds and size != 12)
    return Written(module, source, is_block, takes_other)


def _execute(source: str, name: str) -> type[nn.Module]:
    """The class that the source defines; `inspect` finds its lines, as in a file."""
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    names = {"Children": Children, "F": F, "torch": torch, "__name__": __name__}
    exec(compile(source, name, "exec"), names)
    return names["Written"]
