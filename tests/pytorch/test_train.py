"""examples/train.py: the loss falls, a run goes on bit for bit, fine-tuning takes less memory."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]
EXAMPLE = Path(__file__).parents[2] / "examples" / "train.py"
SMALL = ("--resolution=48", "--width-mult=0.35", "--batch=24", "--learning-rate=0.08")


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A folder with a run of 26 steps, in its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    train.main([*SMALL, f"--output={folder}", "--max-steps=26"])
    return folder


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", printed)]


def flat(state: object, path: str = "") -> dict[str, object]:
    """Every leaf of a checkpoint by where it is."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, item in items for k, v in flat(item, f"{path}/{name}").items()}
    return {path: state}


def differing(first: Path, second: Path) -> list[str]:
    a, b = (flat(torch.load(f / "last.pt", weights_only=True)) for f in (first, second))
    assert a.keys() == b.keys()
    same = (
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )
    return [name for name, equal in zip(a, same, strict=True) if not equal]


def test_the_loss_falls(train, tmp_path, capsys):
    train.main([*SMALL, f"--output={tmp_path}", "--max-steps=30"])
    found = losses(capsys.readouterr().out)
    assert len(found) == 30
    # Of five classes, by chance: log 5 = 1.61.
    assert sum(found[-8:]) / 8 < 0.75 * sum(found[:8]) / 8


@pytest.mark.parametrize("stop", (7, 20, 23))
def test_a_run_goes_on_bit_for_bit(train, whole, tmp_path, stop):
    """Stopped within the first epoch, at its end, and in the second."""
    arguments = [*SMALL, f"--output={tmp_path}"]
    train.main([*arguments, f"--max-steps={stop}"])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["steps"] == stop
    assert differing(whole, tmp_path)
    train.main([*arguments, "--max-steps=26", "--resume"])
    assert differing(whole, tmp_path) == []


def test_another_seed_is_another_run(train, whole, tmp_path):
    train.main([*SMALL, f"--output={tmp_path}", "--max-steps=26", "--seed=1"])
    assert differing(whole, tmp_path)


def test_fine_tuning_with_frozen_norms(train, whole, tmp_path, capsys):
    arguments = [*SMALL, f"--output={tmp_path}", f"--finetune={whole / 'last.pt'}", "--freeze-bn"]
    train.main([*arguments, "--max-steps=3"])
    less = int(re.search(r"(\d+)% less", capsys.readouterr().out)[1])
    assert 60 <= less < 100
    before, after = (
        torch.load(f / "last.pt", weights_only=True)["model"] for f in (whole, tmp_path)
    )
    for name, value in after.items():
        is_statistic = name.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(value, before[name]) == is_statistic, name


def test_the_recipe_is_that_of_the_paper(train, tmp_path):
    options = train.parse([f"--output={tmp_path}"])
    assert (options.batch, options.learning_rate, options.width_mult) == (96, 0.045, 1.0)
    run = train.Run(options, train.Augmented(train.Crops(), 32, 0))
    (group,) = run.optimizer.param_groups
    assert (group["alpha"], group["momentum"], group["weight_decay"]) == (0.9, 0.9, 4e-5)
    run.epoch, run.options.max_steps = 3, 0
    run.train_epoch()
    assert group["lr"] == 0.045 * 0.98**3


def test_too_few_images(train, tmp_path):
    with pytest.raises(SystemExit, match="--batch must be at most the 480 images, got 481"):
        train.main([f"--output={tmp_path}", "--batch=481"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{}/none"], "FOLDER must have one folder of images a class, got {}/none: "),
        (["{}"], "FOLDER must have one folder of images a class, got {}: "),
        (["--output={}", "--resume"], "--resume must find the last.pt of a run, {}/last.pt is no"),
        (["--finetune={}/none.pt"], "--finetune must find the last.pt of a run, {}/none.pt is no "),
        (["--finetune={}/text.pt"], "--finetune must find the last.pt of a run, {}/text.pt: "),
        (["--finetune={}/other.pt"], "--finetune must .*, {}/other.pt is another file"),
    ],
)
def test_what_cannot_be_trained_ends_in_a_sentence(train, arguments, sentence, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([torch.zeros(3)], tmp_path / "other.pt")
    arguments = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match="^" + sentence.format(tmp_path)):
        train.main([*SMALL, "--max-steps=1", f"--output={tmp_path}/out", *arguments])
    assert not (tmp_path / "out").exists()


def test_counts_below_one_are_refused(train, capsys):
    for option in ("--epochs", "--batch", "--max-steps", "--resolution"):
        with pytest.raises(SystemExit, match="2"):
            train.main([option, "0"])
        assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
