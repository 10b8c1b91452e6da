"""Input sources: Poisson spikes, files, and delta-encoded recordings."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from coba_triton.cli.config import FanOut, FileInput, FileSpikes, PoissonInput, RecordingInput, UserError, builtin_folder
from coba_triton.cli.inputs import (
    FileChannels,
    FileSource,
    PoissonDrive,
    RecordingSource,
    Signal,
    delta_encode,
    open_signal,
    resample,
)
from coba_triton.cli.weights import input_weights


def poisson(neurons: int = 5, dt: float = 0.1, steps: int = 1000, **changes: Any) -> PoissonDrive:
    settings: dict[str, Any] = {
        "kind": "poisson",
        "seed": 3,
        "excitatory": {"rate": "800 Hz", "weight": "2 nS"},
        "inhibitory": {"rate": "200 Hz", "weight": "5 nS"},
    }
    return PoissonDrive(PoissonInput(**settings | changes), dt, steps, neurons)


@pytest.mark.parametrize("block", [1, 7, 300])
def test_poisson_does_not_depend_on_the_blocks(block: int) -> None:
    source, steps = poisson(), 1000
    blocks = [source.read(start, min(start + block, steps)) for start in range(0, steps, block)]
    np.testing.assert_array_equal(np.concatenate(blocks), source.read(0, steps))


def test_poisson_depends_on_the_seed_only() -> None:
    np.testing.assert_array_equal(poisson().read(0, 500), poisson(steps=500).read(0, 500))
    assert (poisson().read(0, 500) != poisson(seed=4).read(0, 500)).any()


def test_poisson_rates_and_weights() -> None:
    rate, dt, steps, neurons = 400.0, 0.1, 20_000, 20
    drive = poisson(neurons, dt, steps, excitatory={"rate": "400 Hz", "weight": "1 uS"}, inhibitory=None)
    x = drive.read(0, steps)
    assert x.dtype == np.float32
    expected = rate * dt / 1000 * steps * neurons
    assert abs(float(x.sum()) - expected) < 5 * math.sqrt(expected)  # five standard deviations


def test_inhibition_is_negative_and_leaves_excitation_as_it_was() -> None:
    excitation = poisson(inhibitory=None).read(0, 300)
    inhibition = poisson().read(0, 300) - excitation
    assert inhibition.max() <= 1e-9
    assert inhibition.min() == pytest.approx(-0.005)
    assert ((inhibition < 0) & (excitation > 0)).sum() < 0.2 * (inhibition < 0).sum()  # independent of each other


FAN_OUT = {"seed": 1, "probability": 0.5, "weight": "1 nS", "excitatory_fraction": 0.8}


def file_input(path: Path, array: str | None = None) -> FileInput:
    return FileInput.model_validate({"kind": "file", "path": str(path), "weight": "2 nS", "array": array})


SPIKES = np.random.default_rng(0).random((30, 4)) < 0.3


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_npy_file(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "x.npy", SPIKES.astype(dtype))
    source = FileSource(file_input(tmp_path / "x.npy"), 20, 4)
    np.testing.assert_array_equal(source.read(5, 20), np.float32(0.002) * SPIKES[5:20])


@pytest.mark.parametrize("array", [None, "x"], ids=["the-only-one", "named"])
def test_npz_file(tmp_path: Path, array: str | None) -> None:
    np.savez(tmp_path / "x.npz", x=SPIKES)
    source = FileSource(file_input(tmp_path / "x.npz", array), 30, 4)
    np.testing.assert_array_equal(source.read(0, 30), np.float32(0.002) * SPIKES)


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "dia"])
def test_sparse_npz_file(form: str, tmp_path: Path) -> None:
    sparse.save_npz(tmp_path / "x.npz", getattr(sparse, f"{form}_array")(SPIKES.astype(np.uint8)))
    source = FileSource(file_input(tmp_path / "x.npz"), 20, 4)
    np.testing.assert_array_equal(source.read(3, 20), np.float32(0.002) * SPIKES[3:20])
    spikes = FileSpikes.model_validate({"source": "file", "path": str(tmp_path / "x.npz")})
    channels = FileChannels(spikes, FanOut.model_validate(FAN_OUT), 20, 6)
    np.testing.assert_array_equal(channels.channels(3, 20), SPIKES[3:20])
    with pytest.raises(UserError, match=re.escape("at least [20, 5], got [30, 4]")):
        FileSource(file_input(tmp_path / "x.npz"), 20, 5)
    np.savez(tmp_path / "x.npz", format=b"csr", shape=(30, 4), data=np.ones(3))
    with pytest.raises(UserError, match=r"is a damaged sparse array, without .*; write it with save_npz"):
        FileSource(file_input(tmp_path / "x.npz"), 20, 4)


def test_conductances_keep_their_sign(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[-1.5], [2.0]]))
    source = FileSource(file_input(tmp_path / "x.npy"), 2, 1)
    assert source.read(0, 2).ravel().tolist() == pytest.approx([-0.003, 0.004])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((30, 3)), "must have the shape [steps, neurons], at least [20, 4], got [30, 3]; change"),
        (np.zeros((19, 4)), "at least [20, 4], got [19, 4]"),
        (np.zeros(80), "at least [20, 4], got [80]"),
        (np.zeros((30, 4), complex), "must hold numbers or booleans, got complex128; convert it"),
        (np.full((30, 4), None), "is no .npy or .npz file of numbers; write it with numpy.save"),
    ],
    ids=["neurons", "steps", "rank", "dtype", "pickle"],
)  # fmt: skip
def test_file_that_does_not_fit(tmp_path: Path, values: NDArray[Any], message: str) -> None:
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(message)):
        FileSource(file_input(tmp_path / "x.npy"), 20, 4)


def test_file_that_is_not_finite(tmp_path: Path) -> None:
    values = np.zeros((30, 4))
    values[12, 1] = np.nan
    np.save(tmp_path / "x.npy", values)
    source = FileSource(file_input(tmp_path / "x.npy"), 30, 4)
    source.read(0, 10)
    with pytest.raises(UserError, match="has NaN or infinity in steps 10 to 20; it must be finite"):
        source.read(10, 20)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*x.npy: No such file or directory; give a .npy or .npz"):
        FileSource(file_input(tmp_path / "x.npy"), 1, 1)
    for name, content in (("text.npy", b"hello"), ("empty.npy", b""), ("broken.npz", b"PK\x03\x04hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is no \.npy or \.npz file of numbers"):
            FileSource(file_input(tmp_path / name), 1, 1)
    np.savez(tmp_path / "two.npz", a=SPIKES, b=SPIKES)
    with pytest.raises(UserError, match="holds several arrays; name one with the key array: a, b"):
        FileSource(file_input(tmp_path / "two.npz"), 1, 4)
    with pytest.raises(UserError, match="has no array 'c'; it has a, b"):
        FileSource(file_input(tmp_path / "two.npz", "c"), 1, 4)


def encode_one_by_one(values: NDArray[np.float64], threshold: float) -> NDArray[np.int32]:
    """The encoder's definition, literally: one event at a time."""
    events = np.zeros((len(values), 2), dtype=np.int32)
    level = values[0]
    for step, value in enumerate(values):
        while value - level >= threshold:
            level += threshold
            events[step, 0] += 1
        while level - value >= threshold:
            level -= threshold
            events[step, 1] += 1
    return events


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.25, 1.0, 3.0])
def test_delta_encoder_against_its_definition(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.cumsum(rng.integers(-12, 13, 500)) / 8  # exact in binary: values land on the threshold
    np.testing.assert_array_equal(delta_encode(values, threshold), encode_one_by_one(values, threshold))


def test_delta_encoder_follows_the_signal() -> None:
    values = np.cumsum(np.random.default_rng(1).normal(size=2000))
    events = delta_encode(values, 0.3)
    followed = values[0] + 0.3 * np.cumsum(events[:, 0] - events[:, 1])
    assert np.abs(followed - values).max() < 0.3 + 1e-9
    assert not (events[:, 0] * events[:, 1]).any()


def test_resample_interpolates_linearly() -> None:
    signal = Signal(np.array([0.0, 1.0, 3.0, 2.0]), 100.0, None, None)  # a sample every 10 ms
    assert resample(signal, 0.0, 5.0, 7).tolist() == pytest.approx([0, 0.5, 1, 2, 3, 2.5, 2])
    assert resample(signal, 12.5, 2.5, 2).tolist() == pytest.approx([1.5, 2.0])
    with pytest.raises(UserError, match=r"the recording lasts 0.03 s, and start \+ duration ask for 0.035 s"):
        resample(signal, 0.0, 5.0, 8)


def test_weights() -> None:
    settings = {"probability": 0.5, "weight": "2 nS", "excitatory_fraction": 0.8}
    w = input_weights(FanOut.model_validate({"seed": 1, **settings}), 20_000, 2)
    assert w.shape == (20_000, 2)
    assert w.dtype == np.float32
    connected = w[w != 0]
    assert connected.size / w.size == pytest.approx(0.5, abs=0.02)
    assert (connected > 0).mean() == pytest.approx(0.8, abs=0.02)
    assert np.abs(connected).mean() == pytest.approx(0.002, rel=0.03)
    assert (input_weights(FanOut.model_validate({"seed": 2, **settings}), 20_000, 2) != w).any()


def recording(path: Path, threshold: float | str = 0.5, start: str = "0 ms", **signal: Any) -> RecordingInput:
    return RecordingInput.model_validate(
        {
            "kind": "recording",
            "start": start,
            "threshold": threshold,
            "signal": {"source": "file", "path": str(path), "sampling_rate": "100 Hz", **signal},
            "fan_out": {"seed": 1, "probability": 0.5, "weight": "1 nS", "excitatory_fraction": 0.8},
        }
    )


def test_recording_is_encoded_and_fanned_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.sin(np.arange(50.0)) * 1000)
    source = RecordingSource(recording(tmp_path / "x.npy", "0.2 mV", unit="uV", provenance="made up"), 1.0, 400, 6)
    assert (source.encoded.threshold, source.encoded.unit) == (200.0, "uV")
    assert source.encoded.provenance == "made up"
    assert source.encoded.events.sum() > 20
    expected = source.encoded.events.astype(np.float32) @ source.weights.T
    np.testing.assert_array_equal(source.read(0, 400), expected)
    np.testing.assert_array_equal(source.read(130, 170), expected[130:170])


@pytest.mark.parametrize(
    ("threshold", "signal", "message"),
    [
        ("0.5 mV", {}, "input.threshold must be a number, as the recording has no unit, got '0.5 mV'"),
        (0.5, {"unit": "mV"}, "input.threshold: expected the recorded signal (in mV) such as '0.1 mV'"),
        ("0.5 ms", {"unit": "mV"}, "input.threshold: 'ms' does not measure the recorded signal (in mV)"),
        (0.0, {}, "input.threshold must be above 0, got 0.0"),
    ],
)  # fmt: skip
def test_threshold_that_does_not_fit(tmp_path: Path, threshold: Any, signal: dict[str, str], message: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros(50))
    with pytest.raises(UserError, match=re.escape(message)):
        RecordingSource(recording(tmp_path / "x.npy", threshold, **signal), 1.0, 10, 1)


def test_signal_that_does_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((50, 2)))
    with pytest.raises(UserError, match=re.escape("numbers of shape [samples], got float64 of shape [50, 2]")):
        RecordingSource(recording(tmp_path / "x.npy"), 1.0, 10, 1)
    np.save(tmp_path / "x.npy", np.full(50, np.inf))
    with pytest.raises(UserError, match="the recording has NaN or infinity"):
        RecordingSource(recording(tmp_path / "x.npy"), 1.0, 10, 1)
    np.save(tmp_path / "x.npy", np.zeros(0))
    with pytest.raises(UserError, match="the recording lasts 0 s"):
        RecordingSource(recording(tmp_path / "x.npy"), 1.0, 10, 1)


def packaged() -> RecordingInput:
    fan_out = {"seed": 1, "probability": 0.5, "weight": "1 nS", "excitatory_fraction": 0.8}
    return RecordingInput.model_validate(
        {"kind": "recording", "threshold": "0.1 mV", "signal": {"source": "ecg"}, "fan_out": fan_out}
    )


def test_packaged_ecg() -> None:
    source = RecordingSource(packaged(), 1.0, 2000, 3)
    assert source.encoded.unit == "mV"
    assert 1 < np.ptp(source.encoded.values) < 5
    assert source.encoded.provenance is not None
    assert "MIT-BIH Arrhythmia Database" in source.encoded.provenance


def test_packaged_ecg_is_that_of_the_database() -> None:
    """The converter's numbers: 200 for a mV, and 1024 for 0 mV. Its licence lies beside it."""
    signal = open_signal(packaged())
    assert len(signal.values) == 30 * signal.sampling_rate == 10_800
    numbers = 200 * signal.values + 1024
    assert (numbers == numbers.round()).all()
    digest = hashlib.sha256(numbers.astype("<i2").tobytes()).hexdigest()
    assert digest == "456ffdb24dc69116f1f725c2ea1c3499cf3a7d5fe1f114c71393e8ad32a2c02d"
    text = (builtin_folder() / "ecg.txt").read_text("utf-8")
    assert "Open Data Commons Attribution License v1.0" in text and "Open Data Commons" in (signal.provenance or "")
