"""Recurrent networks on the command line: their weights, how the input reaches them, and what is reported."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from coba_triton import (
    MemorySink,
    PoissonSource,
    Result,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    open_result,
)
from coba_triton.cli import info, job, main, weights
from coba_triton.cli.config import Config, FileWeights, RandomSynapses, UserError, load
from coba_triton.cli.inputs import open_source
from coba_triton.cli.weights import Recurrent, count_synapses, draw_recurrent, open_recurrent, read_synapses

N, CHANNELS, T = 20, 6, 600

CONFIG = """
description = "a test"
notes = ["a note"]
[simulation]
dt = "0.1 ms"
duration = "60 ms"
block_steps = 100
[neuron]
count = 20
tau_syn_exc = "5 ms"
tau_syn_inh = "10 ms"
c_m = "200 pF"
g_l = "10 nS"
e_rev_E = "0 mV"
e_rev_I = "-80 mV"
v_rest = "-60 mV"
v_reset = "-60 mV"
v_thresh = "-50 mV"
[recurrent]
seed = 1
probability = 0.3
excitatory_fraction = 0.75
excitatory_weight = "0.001953125 uS"
inhibitory_weight = "0.0078125 uS"
[input]
kind = "channels"
spikes = { source = "poisson", seed = 2, channels = 6, rate = "400 Hz" }
fan_out = { path = "w_in.npy", weight = "0.0009765625 uS" }
[record]
neurons = [3, 0]
variables = ["v", "g_e", "g_i"]
"""

NONE = Recurrent(Synapses.from_coo([], [], 0.0, shape=(N, N)), 0, np.zeros(N, np.int8), {})

pytestmark = pytest.mark.usefixtures("compiles_in_silence")


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A network whose weights are whole numbers of 2**-10 uS: their sums are exact in any order."""
    np.save(tmp_path / "w_in.npy", np.random.default_rng(0).integers(-2, 5, (N, CHANNELS)))
    path = tmp_path / "test.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


def change(config: str, old: str, new: str) -> None:
    text = Path(config).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(config).write_text(text.replace(old, new), encoding="utf-8")


def from_file(config: str, path: str, extra: str = 'weight = "1 nS"') -> None:
    random = CONFIG[CONFIG.index("[recurrent]") : CONFIG.index("[input]")]
    change(config, random, f'[recurrent]\npath = "{path}"\n{extra}\n')


def whole_run(settings: Config) -> tuple[torch.Tensor, Any]:
    """What the core makes of the configuration in one call."""
    source, recurrent = open_source(settings), open_recurrent(settings)
    assert recurrent is not None
    return coba_lif_integral(
        torch.from_numpy(source.channels(0, T)),
        None,
        torch.from_numpy(source.weights) if isinstance(source.weights, np.ndarray) else source.weights,
        recurrent.synapses,
        job.parameters(settings),
        0.1,
        backend="reference",
        record_states=True,
    )


def run(settings: Config, source: Any = None, recurrent: Any = None) -> Result:
    return job.run(settings, source or open_source(settings), recurrent or open_recurrent(settings), MemorySink()).result


def assert_equal_to_whole_run(config: str) -> None:
    settings = load(config)[1]
    result = run(settings)
    spikes, states = whole_run(settings)
    assert 20 < spikes.sum() < 2000
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    for name in ("v", "g_e", "g_i"):
        np.testing.assert_array_equal(result.traces[name][:], getattr(states, name)[:, [3, 0]].numpy())
    for name, members in (("excitatory", slice(0, 15)), ("inhibitory", slice(15, 20))):
        np.testing.assert_array_equal(result.counts(1, name), spikes[:, members].sum(1).numpy())


@pytest.mark.parametrize("block", [1, 7, 100, 5000])
def test_job_is_the_cores_whole_run_bit_for_bit(config: str, block: int) -> None:
    change(config, "block_steps = 100", f"block_steps = {block}")
    assert_equal_to_whole_run(config)


def test_recurrence_changes_the_spikes(config: str) -> None:
    settings = load(config)[1]
    source = open_source(settings)
    spikes = []
    for recurrent in (open_recurrent(settings), NONE):
        spikes.append(run(settings, source, recurrent).spikes[:])
    assert not np.array_equal(*spikes)


OWN = """kind = "poisson"
seed = 2
excitatory = { rate = "2 kHz", weight = "2 nS" }
inhibitory = { rate = "1 kHz", weight = "1 nS" }
"""


def test_own_input_is_the_feed_forward_one(config: str) -> None:
    """Without synapses among the neurons, a network does what the same neurons do unconnected."""
    text = CONFIG[CONFIG.index('kind = "channels"') : CONFIG.index("[record]")]
    change(config, text, OWN)
    settings = load(config)[1]
    source = open_source(settings)
    alone, connected = (job.run(settings, source, r, MemorySink()).result for r in (None, NONE))
    assert alone.spikes[:].sum() > 20
    np.testing.assert_array_equal(alone.spikes[:], connected.spikes[:])
    np.testing.assert_array_equal(alone.traces["v"][:], connected.traces["v"][:])
    np.testing.assert_allclose(alone.array("input_i"), connected.array("input_i"), rtol=1e-5)


def test_the_split_is_per_synapse(config: str, tmp_path: Path) -> None:
    np.save(tmp_path / "w_in.npy", np.array([[1.0, -1.0]] * N))
    np.save(tmp_path / "x.npy", np.ones((T, 2)))
    change(config, 'source = "poisson", seed = 2, channels = 6, rate = "400 Hz"', 'source = "file", path = "x.npy"')
    settings = load(config)[1]
    result = run(settings)
    assert result.array("input_e") == pytest.approx(2**-10)  # summed before the split, both would be 0
    assert result.array("input_i") == pytest.approx(2**-10)


def test_channels_drive_unconnected_neurons_too(config: str) -> None:
    random = CONFIG[CONFIG.index("[recurrent]") : CONFIG.index("[input]")]
    change(config, random, "")
    settings = load(config)[1]
    source = open_source(settings)
    assert isinstance(source.weights, Synapses)
    exact = source.channels(0, T) @ source.weights.to_dense().numpy().T
    np.testing.assert_array_equal(source.read(0, T), exact)
    np.testing.assert_array_equal(source.read(130, 170), source.read(0, T)[130:170])


def test_poisson_channels(config: str) -> None:
    change(config, 'channels = 6, rate = "400 Hz"', 'channels = 6, rate = "2 kHz", stop = "30 ms"')
    source = open_source(load(config)[1])
    x = source.channels(0, T)
    assert x.shape == (T, CHANNELS)
    expected = 2000 * 1e-4 * 300 * CHANNELS
    assert abs(float(x.sum()) - expected) < 5 * math.sqrt(expected)  # five standard deviations
    assert x[299].any() or x[298].any()
    assert not x[300:].any()
    blocks = [source.channels(start, min(start + 70, T)) for start in range(0, T, 70)]
    np.testing.assert_array_equal(np.concatenate(blocks), x)


SYNAPSES = RandomSynapses(
    seed=1,
    probability=0.1,
    excitatory_fraction=0.8,
    excitatory_weight="2 nS",  # type: ignore[arg-type]
    inhibitory_weight="10 nS",  # type: ignore[arg-type]
)


def test_random_synapses() -> None:
    neurons = 1000
    drawn = draw_recurrent(SYNAPSES, neurons)
    w = drawn.synapses.to_dense().numpy()
    assert (w.shape, w.dtype) == ((neurons, neurons), np.float32)
    assert set(np.unique(w[:, :800])) == {np.float32(0), np.float32(0.002)}  # columns are pre-synaptic
    assert set(np.unique(w[:, 800:])) == {np.float32(0), np.float32(-0.01)}
    assert not w.diagonal().any()
    pairs = neurons * (neurons - 1)
    assert abs(drawn.synapses.count - 0.1 * pairs) < 5 * math.sqrt(pairs * 0.1 * 0.9)
    per_neuron = np.count_nonzero(w, axis=1)
    assert per_neuron.std() == pytest.approx(math.sqrt(neurons * 0.1 * 0.9), rel=0.15)
    assert {name: int(mask.sum()) for name, mask in drawn.populations().items()} == {
        "excitatory": 800,
        "inhibitory": 200,
    }


def test_random_synapses_depend_on_the_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pairs are drawn at a time: one call of the generator for the whole matrix has the same numbers."""
    first = draw_recurrent(SYNAPSES, 51).synapses
    for pairs in (1, 51 * 7, 10**6):
        monkeypatch.setattr(weights, "PAIRS", pairs)
        assert torch.equal(draw_recurrent(SYNAPSES, 51).synapses.to_dense(), first.to_dense())
    other = draw_recurrent(SYNAPSES.model_copy(update={"seed": 2}), 51).synapses
    assert (first.to_dense() != other.to_dense()).any()
    connected = np.random.default_rng(1).random((51, 51), dtype=np.float32) < 0.1
    np.fill_diagonal(connected, False)
    np.testing.assert_array_equal(first.to_dense() != 0, connected)
    assert first.weights.shape == (51, 1)  # one weight for each source


@pytest.mark.parametrize(("fraction", "names"), [(0.0, ["inhibitory"]), (1.0, ["excitatory"])])
def test_one_population_only(fraction: float, names: list[str]) -> None:
    drawn = draw_recurrent(SYNAPSES.model_copy(update={"excitatory_fraction": fraction}), 10)
    assert list(drawn.populations()) == names


DENSE = np.array([[0, -2, 1], [3, 0, -1], [0.5, -1, 0]])


@pytest.mark.parametrize("form", ["npy", "npz", "weight", "data", "coo", "csr", "csc", "bsr", "dia"])
def test_weights_from_a_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"w.{'npy' if form == 'npy' else 'npz'}"
    if form == "npy":
        np.save(path, DENSE)
    elif form == "npz":
        np.savez(path, w=DENSE, other=0)
    elif form not in ("weight", "data"):
        sparse.save_npz(path, getattr(sparse, f"{form}_array")(DENSE))
    else:
        row, col = DENSE.nonzero()
        weight = DENSE[row, col]
        half = weight / 2  # listed twice: they add up
        np.savez(path, row=np.tile(row, 2), col=np.tile(col, 2), **{form: np.concatenate([half, half])})
    settings = {"path": str(path), "weight": "2 nS", "array": "w" if form == "npz" else None}
    found = read_synapses(FileWeights.model_validate(settings), (3, 3), "recurrent")
    np.testing.assert_array_equal(found.to_dense().numpy(), (DENSE * 0.002).astype(np.float32))
    assert found.count == (2 if form in ("weight", "data") else 1) * np.count_nonzero(DENSE)
    if form not in ("npy", "npz", "weight", "data"):
        with pytest.raises(UserError, match=re.escape("recurrent: " + str(path) + " must have the shape [3, 4]")):
            read_synapses(FileWeights.model_validate(settings), (3, 4), "recurrent")


def test_populations_of_a_file_follow_the_signs(config: str, tmp_path: Path) -> None:
    weights = np.zeros((N, N))
    weights[:, 0] = 1
    weights[:, 1] = -1
    weights[:5, 2], weights[5:, 2] = 1, -1
    np.save(tmp_path / "w.npy", weights)
    from_file(config, "w.npy")
    recurrent = open_recurrent(load(config)[1])
    assert recurrent is not None
    members = {name: np.flatnonzero(mask).tolist() for name, mask in recurrent.populations().items()}
    assert members == {"excitatory": [0], "inhibitory": [1], "other": list(range(2, N))}
    checksum = hashlib.sha256((tmp_path / "w.npy").read_bytes()).hexdigest()
    assert recurrent.provenance == {"file": str(tmp_path / "w.npy"), "sha256": checksum}
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "raster.png").is_file()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w": np.zeros((N, N - 1))}, "w.npz must have the shape [20, 20], rows post-synaptic, got [20, 19]; change"),
        ({"w": np.full((N, N), "a")}, "w.npz must hold numbers, got <U1; convert it"),
        ({"w": np.full((N, N), np.inf)}, "w.npz has NaN or infinity; weights must be finite"),
        ({"a": np.zeros((N, N)), "b": 0}, "w.npz holds several arrays; name one with the key array: a, b"),
        ({"row": [0, N], "col": [1, 1], "weight": [1, 1]}, "row in {} must be from 0 to 19, got 0 to 20; change"),
        ({"row": [0, 1], "col": [1, -1], "weight": [1, 1]}, "col in {} must be from 0 to 19, got -1 to 1; change"),
        ({"row": [0, 1], "col": [1], "weight": [1, 1]}, "must be of one length, the first two integers, got int64 [2]"),
        ({"row": [0.0], "col": [1], "weight": [1]}, "must be of one length, the first two integers, got float64 [1]"),
        ({"row": [0], "col": [1], "weight": [np.nan]}, "w.npz has NaN or infinity"),
    ],
)  # fmt: skip
def test_file_that_does_not_fit(config: str, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "w.npz", **{name: np.asarray(values) for name, values in arrays.items()})
    from_file(config, "w.npz")
    with pytest.raises(UserError, match=re.escape(message.format(tmp_path / "w.npz"))):
        open_recurrent(load(config)[1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (-np.ones((T, CHANNELS)), "has negative or infinite numbers or NaN in steps 0 to 600; channels hold spike counts"),
        (np.ones((T - 1, CHANNELS)), "must have the shape [steps, channels], at least [600, channels], got [599, 6]"),
        (np.ones((T, CHANNELS + 1)), "input.fan_out: {} must have the shape [20, 7], rows post-synaptic, got [20, 6]"),
    ],
    ids=["negative", "short", "channels"],
)  # fmt: skip
def test_channels_that_do_not_fit(config: str, tmp_path: Path, array: np.ndarray[Any, Any], message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    change(config, 'source = "poisson", seed = 2, channels = 6, rate = "400 Hz"', 'source = "file", path = "x.npy"')
    with pytest.raises(UserError, match=re.escape(message.format(tmp_path / "w_in.npy"))):
        open_source(load(config)[1]).channels(0, T)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("inhibitory_weight", "inhibitory_wieght", "recurrent: unknown key 'inhibitory_wieght'; did you mean"),
        ("[recurrent]\nseed = 1", "[recurrent]", "recurrent: seed is missing; add it"),
        ("probability = 0.3", "probability = 1.5", "recurrent.probability: should be less than or equal to 1, got 1.5"),
        ("probability = 0.3", 'probability = "30 %"', "recurrent.probability: should be a valid number, got '30 %'"),
        ("fraction = 0.75", "fraction = -0.1", "recurrent.excitatory_fraction: should be greater than or equal to 0"),
        ('"0.0078125 uS"', '"-7 nS"', "recurrent.inhibitory_weight: must not be negative, got '-7 nS'"),
        ('"0.0078125 uS"', '"7 mV"', "recurrent.inhibitory_weight: 'mV' does not measure a conductance"),
        ('"w_in.npy", weight = "0.0009765625 uS"', '"w_in.npy"', "input.fan_out: weight is missing; add it, such as"),
        ('"w_in.npy", weight = "0.0009765625 uS"', '"w_in.npy", seed = 1', "input.fan_out: unknown key 'seed'; the keys"),
        ('rate = "400 Hz"', 'rate = "-1 Hz"', "input.spikes.rate: must not be negative, got '-1 Hz'"),
        ("channels = 6", "channels = 0", "input.spikes.channels: should be greater than 0, got 0"),
        ('source = "poisson"', 'source = "poison"', "input.spikes: source must be one of 'poisson', 'file', 'events', got"),
        ('notes = ["a note"]', 'notes = "a note"', "notes: should be a valid list, got 'a note'"),
    ],
)  # fmt: skip
def test_message(config: str, old: str, new: str, message: str) -> None:
    change(config, old, new)
    with pytest.raises(UserError, match=re.escape(f"test.toml: {message}")):
        load(config)


def test_summary_and_table(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    rates = open_result(tmp_path / "out" / "result.zarr").spikes[:].sum(0) / 0.06
    recurrent = summary["recurrent"]
    settings = load(config)[1]
    network = open_recurrent(settings)
    assert network is not None
    assert recurrent["synapses"] == network.synapses.count
    assert recurrent["input_synapses"] == count_synapses(open_source(settings).weights) > 0
    assert recurrent["seed"] == 1
    assert summary["seeds"] == {"recurrent.seed": 1, "input.spikes.seed": 2}
    assert summary["config"]["notes"] == ["a note"]
    assert Config.model_validate(summary["config"]) == settings
    assert [p["neurons"] for p in recurrent["populations"].values()] == [15, 5]
    assert recurrent["populations"]["excitatory"]["rate_hz"] == pytest.approx(rates[:15].mean())
    assert recurrent["populations"]["inhibitory"]["rate_hz"] == pytest.approx(rates[15:].mean())
    printed = capsys.readouterr()
    assert printed.err == ""
    for row in (f"{recurrent['synapses']} (random, seed 1)", "15 neurons, ", "5 neurons, "):
        assert row in printed.out


@pytest.mark.filterwarnings("default")
def test_runaway_is_warned_about_once(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(config, '"0.001953125 uS"', '"2 uS"')
    assert main(["simulate", config, "--out", str(tmp_path / "out"), "--keep-going"]) == 0
    unstable, constant = capsys.readouterr().err.splitlines()
    assert unstable.startswith(
        "coba-triton: warning: the Euler step is unstable: dt * c_m_inv * (g_l + g_e + g_i) has reached"
    )
    assert "neurons fire in every step" in constant


def test_not_enough_memory(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(job, "run", fail)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    assert "not enough memory (Unable to allocate 1 TiB); make neuron.count" in capsys.readouterr().err


def test_not_enough_memory_for_a_tensor(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch has an error of its own for that."""
    monkeypatch.setattr(job, "simulate", lambda *_, **__: torch.zeros(10**17))
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    told = "not enough memory (PyTorch asked for 400,000,000,000,000,000 bytes); make neuron.count, the channels or "
    more = "simulation.block_steps smaller, or, where synapses have delays, simulation.dt longer"
    assert capsys.readouterr().err == f"coba-triton: {told}{more}\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU"),
            "PyTorch asked for 20.00 GiB",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error: out of memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "PyTorch asked for more bytes than"),
        (MemoryError(), None),
    ],
)
def test_every_lack_of_memory_is_told_in_one_sentence(
    error: Exception, message: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == 2
    said = f" ({message}" if message else ";"
    printed = capsys.readouterr().err
    assert printed.startswith(f"coba-triton: not enough memory{said}") and printed.endswith("; choose smaller sizes\n")


def test_builtin_va_keeps_itself_going(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published network still fires 950 ms after the last input, irregularly and at its rate."""
    assert main(["simulate", "va", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""  # no warning of an unstable step
    result = open_result(tmp_path / "result.zarr")
    spikes = result.spikes[500:]
    assert not result.array("input_e")[500:].any() and result.array("input_e")[:500].any()
    for part in (spikes, spikes[-1000:]):
        assert 12 < part.mean() / 1e-4 < 17
    assert np.diff(np.flatnonzero(spikes.any(1))).max() < 10  # of 4000 neurons, some fire in every millisecond
    for train in spikes.T[:400]:
        intervals = np.diff(np.flatnonzero(train))
        assert not len(intervals) or intervals.min() > 50  # the refractory period is 50 steps
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert {name: p["neurons"] for name, p in summary["recurrent"]["populations"].items()} == {
        "excitatory": 3200,
        "inhibitory": 800,
    }
    assert summary["recurrent"]["synapses"] == pytest.approx(0.02 * 4000 * 3999, rel=0.01)
    assert summary["recurrent"]["input_synapses"] == pytest.approx(0.01 * 20 * 4000, rel=0.2)
    assert summary["interval_cv"]["mean"] > 1  # neurons fire in bursts


def test_groups_of_channels(config: str, tmp_path: Path) -> None:
    """Excitatory ones and inhibitory ones, each with a rate and weights of its own."""
    only = open_source(load(config)[1])
    text = Path(config).read_text(encoding="utf-8")
    more = """
[[input.more]]
spikes = { source = "poisson", seed = 9, channels = 3, rate = "900 Hz" }
fan_out = { seed = 8, probability = 0.9, weight = "1 nS", excitatory_fraction = 0.0 }
"""
    Path(config).write_text(text + more, encoding="utf-8")
    source = open_source(load(config)[1])
    other = PoissonSource(900.0, T, 3, 0.1, seed=9)[:].numpy()
    np.testing.assert_array_equal(source.channels(0, T), np.concatenate([only.channels(0, T), other], axis=1))
    assert isinstance(source.weights, Synapses) and isinstance(only.weights, Synapses)
    dense = source.weights.to_dense()
    assert torch.equal(dense[:, :CHANNELS], only.weights.to_dense())
    assert dense.shape == (N, CHANNELS + 3) and dense[:, CHANNELS:].max() <= 0 > dense[:, CHANNELS:].min()
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    result = open_result(tmp_path / "out" / "result.zarr")
    p, recurrent = job.parameters(load(config)[1]), open_recurrent(load(config)[1])
    assert recurrent is not None
    x = torch.from_numpy(source.channels(0, T))
    spikes, _ = coba_lif_integral(x, None, source.weights, recurrent.synapses, p, 0.1, backend="reference")
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())


@pytest.mark.parametrize("connected", [True, False])
def test_no_input(connected: bool, config: str, tmp_path: Path) -> None:
    """A current and the neurons' own activity are all there is."""
    text = Path(config).read_text(encoding="utf-8")
    before, _, rest = text.partition("[input]")
    if not connected:
        before = before.partition("[recurrent]")[0]
    before = before.replace(
        "[neuron]", '[neuron]\ni_offset = "0.2 nA"\nv_init = { low = "-60 mV", high = "-50 mV", seed = 1 }'
    )
    record = rest[rest.index("[record]") :] if "[record]" in rest else ""
    Path(config).write_text(before + '[input]\nkind = "none"\n' + record, encoding="utf-8")
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    result = open_result(tmp_path / "out" / "result.zarr")
    assert (result.spike_counts() > 0).sum() > N / 2
    assert not result.array("input_e").any() and not result.array("input_i").any()
    settings = load(config)[1]
    p, state = job.parameters(settings), job.initial_state(settings, connected, torch.device("cpu"))
    if connected:
        recurrent = open_recurrent(settings)
        assert recurrent is not None
        to = torch.zeros(N, 0)
        spikes = coba_lif_integral(torch.zeros(T, 0), state, to, recurrent.synapses.to_dense(), p, 0.1)[0]
    else:
        spikes = coba_lif_feed_forward_integral(torch.zeros(T, N), state, p, 0.1)[0]
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
