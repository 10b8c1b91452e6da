"""Trains a recurrent network of conductance-based LIF neurons to read handwritten digits.

Each of scikit-learn's digits (1797 images of 8 x 8 pixels) becomes spike trains of 50 ms: in every step of 1 ms a pixel
spikes with a probability that is proportional to its brightness. The spikes drive a recurrent population. A linear readout
of the population's spike counts tells the digit. All weights are learned by backpropagation through time. The parameters of
the neurons, the initial weights and the learning rate are the defaults of this package and of Adam.

    python examples/train_digits.py
    python examples/train_digits.py --device cuda --epochs 60 --out out/digits-gpu

It writes ``training.png``, with loss, accuracy and firing rate after every epoch, and ``training.json``, with all numbers.
A fifth of the images, stratified, is the test set, which is used once, after the last epoch. Another fifth is for
validation; the settings were chosen by it. With the same seed, device and backend a run gives the same numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn

    from coba_triton import CobaLIFRecurrent, default_learning_parameters
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    package = "scikit-learn" if missing == "sklearn" else missing
    print(f"train_digits: it needs {package}, which is not installed; pip install {package}", file=sys.stderr)
    sys.exit(2)

DT = 1.0  # ms, the default
SPIKE_PROBABILITY = 0.4  # of the brightest pixel in one step
FILES = ("training.png", "training.json")


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    epochs: int = 30
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    steps: int = 50
    hidden: int = 128
    batch: int = 32
    images: int | None = None  # of all splits together; None for all


@dataclass(frozen=True)
class Split:
    """Images as brightness from 0 to 1, ``[B, 64]``, and their digits ``[B]``."""

    images: Tensor
    digits: Tensor


class Classifier(nn.Module):
    """A recurrent population with the default parameters, and a linear readout of its spike counts."""

    def __init__(self, hidden: int, backend: str) -> None:
        super().__init__()
        self.hidden = CobaLIFRecurrent(64, hidden, dt=DT, return_state=False, backend=backend)
        self.readout = nn.Linear(hidden, 10)

    def forward(self, spikes: Tensor) -> tuple[Tensor, Tensor]:
        """Input spikes ``[T, B, 64]`` to logits ``[B, 10]`` and spikes per neuron and step ``[B, N]``."""
        hidden = self.hidden(spikes)
        return self.readout(hidden.sum(0)), hidden.mean(0)


class UserError(Exception):
    """An error that the user can put right. Its message is one sentence."""


def load(count: int | None) -> dict[str, Split]:
    """Load the digits in three stratified splits, which are the same for every seed."""
    images, digits = load_digits(return_X_y=True)
    images, digits = images[:count] / 16, digits[:count]
    images, test_images, digits, test_digits = train_test_split(
        images, digits, test_size=0.2, stratify=digits, random_state=0
    )
    images, validation_images, digits, validation_digits = train_test_split(
        images, digits, test_size=0.25, stratify=digits, random_state=0
    )
    splits = dict(train=(images, digits), validation=(validation_images, validation_digits), test=(test_images, test_digits))
    return {name: Split(torch.tensor(x).float(), torch.tensor(y)) for name, (x, y) in splits.items()}


def encode(images: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Draw spikes ``[T, B, 64]`` with rates by brightness. They are drawn on the CPU, so every device gets the same ones."""
    return torch.rand(steps, *images.shape, generator=generator) < SPIKE_PROBABILITY * images


@torch.no_grad()
def evaluate(model: Classifier, split: Split, steps: int, seed: int, device: torch.device) -> dict[str, float]:
    """Loss, accuracy, firing rate and share of neurons that never fire, over one presentation of every image."""
    spikes = encode(split.images, steps, torch.Generator().manual_seed(seed))
    logits, rates = model(spikes.to(device))
    digits = split.digits.to(device)
    return dict(
        loss=nn.functional.cross_entropy(logits, digits).item(),
        accuracy=(logits.argmax(1) == digits).double().mean().item(),
        spikes_per_step=rates.double().mean().item(),
        silent_neurons=(rates.sum(0) == 0).double().mean().item(),
    )


def train(settings: Settings, show: Callable[[str | None], None] = lambda line: None) -> dict[str, Any]:
    """Train and test.

    Args:
        settings: what to run.
        show: called after every batch with None, and after every epoch with a line about it.

    Returns:
        The content of ``training.json``.

    Raises:
        UserError: if the device or the backend cannot serve.
    """
    started = time.perf_counter()
    splits = load(settings.images)
    data = splits["train"]
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model, device = place(Classifier(settings.hidden, settings.backend), settings)
    optimizer = torch.optim.Adam(model.parameters())

    before = evaluate(model, splits["validation"], settings.steps, settings.seed, device)
    epochs = []
    for epoch in range(1, settings.epochs + 1):
        epoch_started = time.perf_counter()
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for chosen in torch.randperm(len(data.digits), generator=generator).split(settings.batch):
            spikes = encode(data.images[chosen], settings.steps, generator).to(device)
            digits = data.digits[chosen].to(device)
            logits, _ = model(spikes)
            loss = nn.functional.cross_entropy(logits, digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(digits)
            correct += (logits.argmax(1) == digits).sum()
            show(None)
        row = dict(
            epoch=epoch,
            train=dict(loss=loss_sum.item() / len(data.digits), accuracy=correct.item() / len(data.digits)),
            validation=evaluate(model, splits["validation"], settings.steps, settings.seed, device),
            seconds=time.perf_counter() - epoch_started,
        )
        epochs.append(row)
        show(describe(row))
    test = evaluate(model, splits["test"], settings.steps, settings.seed + 1, device)
    return dict(
        settings=asdict(settings),
        neuron=default_learning_parameters._asdict() | dict(dt=DT),
        encoding=dict(spike_probability=SPIKE_PROBABILITY, input_spikes_per_step=input_rate(data)),
        optimizer=dict(name="Adam", learning_rate=optimizer.defaults["lr"]),
        images={name: len(split.digits) for name, split in splits.items()},
        untrained=before,
        epochs=epochs,
        test=test,
        seconds=time.perf_counter() - started,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def place(model: Classifier, settings: Settings) -> tuple[Classifier, torch.device]:
    """Move the model to its device, and run one step to see whether the device and the backend work."""
    try:
        device = torch.device(settings.device)
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {settings.device} cannot be used ({reason}); pass --device cpu") from None
    try:
        model(torch.zeros(1, 1, 64, device=device))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--backend {settings.backend} cannot serve: {error}") from None
    return model, device


def batches(data: Split, batch: int) -> int:
    return math.ceil(len(data.digits) / batch)


def input_rate(data: Split) -> float:
    return SPIKE_PROBABILITY * data.images.double().mean().item()


def describe(row: dict[str, Any]) -> str:
    train, validation = row["train"], row["validation"]
    return (
        f"epoch {row['epoch']:3}   loss {train['loss']:.3f}   validation {validation['accuracy']:6.1%}   "
        f"rate {1000 / DT * validation['spikes_per_step']:3.0f} Hz   {row['seconds']:.1f} s"
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("coba-triton", "torch", "numpy", "scikit-learn", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def draw(result: dict[str, Any]) -> Figure:
    """Draw loss, accuracy and firing rate over the epochs."""
    epochs, test = result["epochs"], result["test"]
    number = [row["epoch"] for row in epochs]
    train, validation, tested = "#8a8f98", "#0f7b6c", "#222222"
    figure = Figure((13, 4.2), 120, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)

    for panel, field in ((loss, "loss"), (accuracy, "accuracy")):
        panel.plot(number, [row["train"][field] for row in epochs], ".-", color=train, label="training")
        panel.plot(number, [row["validation"][field] for row in epochs], ".-", color=validation, label="validation")
    label = f"test, after the last epoch: {test['accuracy']:.1%}"
    accuracy.plot(number[-1], test["accuracy"], "*", color=tested, markersize=13, label=label)
    loss.set_yscale("log")
    loss.set_ylabel("cross-entropy (nats)")
    accuracy.set_ylabel("images told right")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, 0))
    accuracy.set_ylim(top=1.005)

    rates = [1000 / DT * values["spikes_per_step"] for values in (result["untrained"], *(r["validation"] for r in epochs))]
    rate.plot([0, *number], rates, ".-", color=validation, label="hidden neurons, validation")
    inputs = 1000 / DT * result["encoding"]["input_spikes_per_step"]
    rate.axhline(inputs, color=tested, linestyle="--", label="input rate")
    rate.set_ylabel("mean firing rate (Hz)")
    rate.set_ylim(0, 1.1 * max(inputs, *rates))

    for panel, title in ((loss, "Loss"), (accuracy, "Accuracy"), (rate, "Activity")):
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=9, loc="upper right" if panel is loss else "lower right")
    settings = result["settings"]
    figure.suptitle(
        f"{settings['hidden']} recurrent COBA LIF neurons learn digits: {settings['steps']} steps of {DT:g} ms, "
        f"{result['images']['train']} training images, seed {settings['seed']}"
    )
    return figure


def prepare(folder: Path) -> None:
    """Make the folder and find out, before the training, whether it can be written to."""
    probe = folder / ".part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); pass another folder with --out") from None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    default = Settings()
    parser = Parser("train_digits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder for the results (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=default.epochs, help="passes over the data (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, order and spikes (%(default)s)")
    parser.add_argument("--device", default=default.device, help="where to train, as torch names it (%(default)s)")
    parser.add_argument("--backend", default=default.backend, help="of coba_triton (%(default)s)")
    options = vars(parser.parse_args(arguments))
    return Settings(**{name: value for name, value in options.items() if name != "out"}), options["out"]


def main(arguments: Sequence[str] | None = None) -> int:
    settings, out = parse(arguments)
    torch.set_num_threads(1)  # a step is so small that threads would wait for each other longer than they work
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeRemainingColumn())
    try:
        prepare(out)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("training", total=settings.epochs * batches(load(None)["train"], settings.batch))

            def show(line: str | None) -> None:
                if line is None:
                    progress.advance(task)
                else:
                    print(line, flush=True)

            result = train(settings, show)
    except UserError as error:
        print(f"train_digits: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_digits: interrupted; nothing was written", file=sys.stderr)
        return 130
    draw(result).savefig(out / FILES[0])
    (out / FILES[1]).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"Test accuracy {result['test']['accuracy']:.1%} in {result['seconds']:.0f} s")
    print(f"Wrote {' and '.join(FILES)} to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
