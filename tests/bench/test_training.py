"""The training example: it learns, repeats itself, writes its files, and says in one sentence what is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the training example needs scikit-learn")
pytest.importorskip("rich", reason="the training example needs rich")
pytest.importorskip("matplotlib", reason="the training example needs matplotlib")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(script: ModuleType) -> Any:
    return script.Settings(epochs=3, hidden=32, images=200)


@pytest.fixture(autouse=True)
def one_thread(number_of_threads: None) -> None:
    torch.set_num_threads(1)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    epochs = [{name: value for name, value in row.items() if name != "seconds"} for row in result["epochs"]]
    return {name: value for name, value in result.items() if name != "seconds"} | {"epochs": epochs}


def test_learns_and_repeats_itself(script: ModuleType, small: Any) -> None:
    lines: list[str | None] = []
    result = script.train(small, lines.append)
    losses = [row["train"]["loss"] for row in result["epochs"]]
    assert losses == sorted(losses, reverse=True)
    assert result["epochs"][-1]["validation"]["loss"] < result["untrained"]["loss"]
    assert result["images"] == {"train": 120, "validation": 40, "test": 40}
    assert len(lines) == 3 * (4 + 1)
    assert str(lines[-1]).startswith("epoch   3   loss")

    assert without_times(script.train(small)) == without_times(result)
    other = script.train(replace(small, seed=1))
    assert other["epochs"][0]["train"]["loss"] != result["epochs"][0]["train"]["loss"]


def test_splits_are_apart_and_stratified(script: ModuleType) -> None:
    splits = script.load(None)
    assert {name: len(split.digits) for name, split in splits.items()} == {"train": 1077, "validation": 360, "test": 360}
    rows = [tuple(image.tolist()) for split in splits.values() for image in split.images]
    assert len(set(rows)) == len(rows) == 1797
    for split in splits.values():
        assert split.digits.bincount().min() >= len(split.digits) / 10 - 4


def test_population_fires_and_passes_gradients_from_the_start(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.Classifier(128, "auto")
    images = script.load(None)["train"]
    spikes = script.encode(images.images[:64], 50, torch.Generator().manual_seed(0))
    logits, rates = model(spikes)
    assert 0.05 < rates.mean() < 0.2
    assert (rates.sum(0) > 0).all()
    torch.nn.functional.cross_entropy(logits, images.digits[:64]).backward()
    for weights in model.parameters():
        assert weights.grad.isfinite().all()
        assert (weights.grad != 0).double().mean() > 0.8


def test_writes_its_files(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Settings", lambda **options: replace(small, **options))
    assert script.main(["--epochs", "2", "--seed", "3", "--backend", "reference", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert [line[:9] for line in printed.out.splitlines()] == ["epoch   1", "epoch   2", "Test accu", "Wrote tra"]
    assert printed.err == ""

    result = json.loads((tmp_path / "new" / "training.json").read_text("utf-8"))
    assert result["settings"] == dict(
        epochs=2, seed=3, device="cpu", backend="reference", steps=50, hidden=32, batch=32, images=200
    )
    assert set(result["versions"]) == {"python", "coba-triton", "torch", "numpy", "scikit-learn", "triton"}
    assert [row["epoch"] for row in result["epochs"]] == [1, 2]
    assert set(result["test"]) == {"loss", "accuracy", "spikes_per_step", "silent_neurons"}
    assert result["seconds"] > sum(row["seconds"] for row in result["epochs"]) > 0
    picture = (tmp_path / "new" / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1 on, got '0'"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--device", "quantum"], "--device quantum cannot be used (.*); pass --device cpu"),
        pytest.param(["--device", "cuda"], "--device cuda cannot be used (.*); pass --device cpu", marks=NO_CUDA),
        (["--backend", "gpu"], "--backend gpu cannot serve: backend must be one of .* got 'gpu'"),
        (["--out", __file__], "cannot write to .*; pass another folder with --out"),
    ],
    ids=["epochs", "unknown", "device", "cuda", "backend", "out"],
)
def test_error_is_one_sentence(
    script: ModuleType, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = script.main(["--out", str(tmp_path), *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^train_digits: {pattern}\n$"):
        raise ValueError(error)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_package_is_one_sentence(module: str, package: str) -> None:
    code = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"train_digits: it needs {package}, which is not installed; pip install {package}\n"


def test_interrupted(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", interrupt)
    assert script.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "train_digits: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_reads_digits(script: ModuleType) -> None:
    """At half the epochs of the default run."""
    result = script.train(script.Settings(epochs=15))
    assert result["test"]["accuracy"] >= 0.92
    assert 0.05 < result["test"]["spikes_per_step"] < 0.2
