"""torch.export, its decomposition to plain aten, and AOTInductor's packages."""

import pytest
import torch
import torchvision
from closeness import close
from same_answers import randomise
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.ops.decompositions import DECOMPOSITIONS

pytestmark = pytest.mark.usefixtures("kernel_backend", "one_thread")

OP = torch.ops.mnv2.inverted_residual.default


def network() -> nn.Module:
    """Stem and three blocks: without expansion, with stride 2, with residual."""
    features = torchvision.models.mobilenet_v2(width_mult=0.35).features[:4]
    return randomise(features)


def targets(program: torch.export.ExportedProgram) -> list:
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


@pytest.fixture
def exported():
    """(plain network, its fused form exported with any batch from 1 to 64, an image)."""
    plain = network()
    x = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(mk.fuse(plain), (x,), dynamic_shapes=({0: batch},))
    return plain, program, x


@torch.no_grad()
def test_export_keeps_the_op(exported, tmp_path):
    plain, program, x = exported
    assert targets(program).count(OP) == 3
    assert set(program.state_dict) == set(plain.state_dict())
    torch.export.save(program, tmp_path / "fused.pt2")
    again = torch.export.load(tmp_path / "fused.pt2")
    assert targets(again).count(OP) == 3
    for images in (x, torch.randn(5, 3, 32, 32)):
        close(again.module()(images), plain(images))


@torch.no_grad()
def test_exported_weights_can_be_replaced(exported):
    """The folding is part of the graph, so that a program follows its state_dict."""
    plain, program, x = exported
    other = network()
    assert (other(x) - plain(x)).abs().max() > 1e-2
    module = program.module()
    module.load_state_dict(other.state_dict(), strict=True)
    close(module(x), other(x))


@torch.no_grad()
@pytest.mark.parametrize("core", [False, True], ids=["ours", "core aten"])
def test_decomposition_to_plain_aten(exported, core):
    plain, program, x = exported
    table = torch.export.default_decompositions() if core else {}
    table.update(DECOMPOSITIONS)
    program = program.run_decompositions(table)
    names = [t for t in targets(program) if isinstance(t, torch._ops.OpOverload)]
    assert {name.namespace for name in names} == {"aten"}
    convolutions = sum(name._schema.name in ("aten::conv2d", "aten::convolution") for name in names)
    assert convolutions == 1 + 2 + 3 + 3
    for images in (x, torch.randn(5, 3, 32, 32)):
        close(program.module()(images), plain(images))


def test_decomposition_has_the_layout_of_the_op():
    block = mk.InvertedResidual(8, 8).eval()
    x = torch.randn(2, 8, 5, 6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments = (x.contiguous(memory_format=memory_format), *block.folded_arguments())
        ours, plain = OP(*arguments), DECOMPOSITIONS[OP](*arguments)
        assert ours.stride() == plain.stride()
        close(ours, plain)


AOT_INDUCTOR = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
x, expected = torch.load(sys.argv[2])
for images, truth in zip(x, expected):
    torch.testing.assert_close(package(images), truth, rtol=1e-4, atol=1e-4)
print("same")
"""


@torch.no_grad()
def test_aot_inductor_package_in_another_process(python, tmp_path):
    """Decomposed: its loader cannot read the infinite clips of the op, and need not know the op."""
    plain = nn.Sequential(network()[2])
    images = [torch.randn(batch, 8, 9, 9) for batch in (2, 3)]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(mk.fuse(plain), (images[0],), dynamic_shapes=({0: batch},))
    assert OP in targets(program)
    program = program.run_decompositions(DECOMPOSITIONS)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "fused.pt2")
    )
    torch.save((images, [plain(x) for x in images]), tmp_path / "images.pt")
    done = python("-c", AOT_INDUCTOR, package, str(tmp_path / "images.pt"))
    assert done.stdout == "same\n", done.stderr
