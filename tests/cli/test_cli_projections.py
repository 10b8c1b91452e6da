"""Configurations of sparse networks: projections between populations, delays, synapses in files, and messages."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from coba_triton import MemorySink, Normal, Synapses, Uniform, coba_lif_integral, open_result
from coba_triton.cli import job, main
from coba_triton.cli.config import Config, UserError, load
from coba_triton.cli.inputs import open_source
from coba_triton.cli.weights import open_recurrent

N, E, INHIBITORY, CHANNELS, T = 20, 14, 4, 6, 600

CONFIG = """
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
refractory = "1 ms"
[[population]]
name = "excitatory"
neurons = [0, 14]
[[population]]
name = "inhibitory"
neurons = [16, 20]
[[projection]]
source = "excitatory"
receptor = "excitatory"
probability = 0.5
weight = "2 nS"
delay = "0.3 ms"
seed = 1
[[projection]]
source = "inhibitory"
target = "excitatory"
receptor = "inhibitory"
number = 3
weight = { law = "uniform", low = "4 nS", high = "9 nS" }
delay = { law = "normal", mean = "2 ms", std = "1 ms", low = "0.5 ms" }
seed = 2
[input]
kind = "channels"
spikes = { source = "poisson", seed = 2, channels = 6, rate = "400 Hz" }
fan_out = { receptor = "excitatory", number = 2, weight = "6 nS", seed = 9 }
[record]
neurons = [3, 0]
variables = ["v", "g_e", "g_i"]
"""

pytestmark = pytest.mark.usefixtures("compiles_in_silence")


def write(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = CONFIG
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "test.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *changes: tuple[str, str]) -> Config:
    return load(write(tmp_path, *changes))[1]


def synapses_of(config: Config) -> Synapses:
    recurrent = open_recurrent(config)
    assert recurrent is not None
    return recurrent.synapses


FIRST, SECOND = (CONFIG[CONFIG.index(f"[[projection]]\nsource = {name}") :] for name in ('"exc', '"inh'))
FIRST, SECOND = FIRST[: FIRST.index("[[projection]]", 1)], SECOND[: SECOND.index("[input]")]


def test_a_job_is_one_call_bit_for_bit(tmp_path: Path) -> None:
    config = read(tmp_path)
    source, recurrent = open_source(config), open_recurrent(config)
    assert isinstance(source.weights, Synapses) and recurrent is not None
    assert recurrent.synapses.check_delays(0.1)[1] > 20
    x = torch.from_numpy(source.channels(0, T))
    net = source.weights, recurrent.synapses
    options: dict[str, Any] = {"backend": "reference"}
    spikes, states = coba_lif_integral(x, None, *net, job.parameters(config), 0.1, record_states=True, **options)
    assert 20 < spikes.sum() < 2000
    result = job.run(config, source, recurrent, MemorySink()).result
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    for name in ("v", "g_e", "g_i"):
        np.testing.assert_array_equal(result.traces[name][:], getattr(states, name)[:, [3, 0]].numpy())
    assert list(result.populations) == ["excitatory", "inhibitory", "all others"]
    np.testing.assert_array_equal(result.counts(1, "inhibitory"), spikes[:, 16:].sum(1).numpy())


def test_projections_are_those_of_the_constructors(tmp_path: Path) -> None:
    synapses = synapses_of(read(tmp_path))
    first = Synapses.fixed_probability(E, N, 0.5, 0.002, 0.3, seed=1)
    laws = Uniform(-0.009, -0.004), Normal(2.0, 1.0, low=0.5)
    second = Synapses.fixed_number(INHIBITORY, E, 3, *laws, seed=2)
    dense = torch.zeros(N, N)
    dense[:, :E] = first.to_dense().fill_diagonal_(0)
    dense[:E, 16:] = second.to_dense()
    assert torch.equal(synapses.to_dense(), dense)
    assert synapses.delays is not None
    sources = synapses.source_of()
    assert set(synapses.delays[sources < E].tolist()) == {np.float32(0.3)}
    assert torch.equal(synapses.delays[sources >= 16], second.delays)
    assert synapses.weights[sources >= 16].max() < 0 < synapses.weights[sources < E].min()


@pytest.mark.parametrize("autapses", [True, False])
@pytest.mark.parametrize(
    "ends", ["", 'source = "excitatory"', 'target = "inhibitory"', 'source = "excitatory"\ntarget = "excitatory"']
)
def test_autapses(ends: str, autapses: bool, tmp_path: Path) -> None:
    projection = f'[[projection]]\n{ends}\nreceptor = "excitatory"\nprobability = 1.0\nweight = "1 nS"\nseed = 1\n'
    if autapses:
        projection += "autapses = true\n"
    synapses = synapses_of(read(tmp_path, (FIRST, projection), (SECOND, "")))
    sources, targets = (
        (E if "source" in ends else N),
        (E if ends.count("exc") == 2 else INHIBITORY if "target" in ends else N),
    )
    own = min(sources, targets) * (not autapses)
    assert synapses.count == sources * targets - own
    assert bool((synapses.targets == synapses.source_of()).any()) == autapses
    assert (synapses.weights.shape, synapses.delays) == ((1,), None)


@pytest.mark.parametrize("per", ["target", "source"])
def test_a_number_of_synapses(per: str, tmp_path: Path) -> None:
    more = f'number = 12\nper = "{per}"\nseveral = true'
    among = ('"excitatory"\nreceptor = "inh', '"inhibitory"\nreceptor = "inh')
    synapses = synapses_of(read(tmp_path, ("number = 3", more), (FIRST, ""), among))
    assert synapses.count == 12 * INHIBITORY
    assert set(synapses.targets.tolist()) == set(synapses.source_of().tolist()) == set(range(16, N))
    each = synapses.targets.long() if per == "target" else synapses.source_of()
    assert torch.bincount(each, minlength=N)[16:].tolist() == [12] * INHIBITORY
    assert not (synapses.targets == synapses.source_of()).any()


LOGNORMAL = '"lognormal", mean = "4 nS", std = "2 nS"'
NORMAL = '"normal", mean = "4 nS", std = "8 nS", high = "10 nS"'


@pytest.mark.parametrize("law", [LOGNORMAL, NORMAL])
@pytest.mark.parametrize("receptor", ["excitatory", "inhibitory"])
def test_random_weights_keep_their_sign(receptor: str, law: str, tmp_path: Path) -> None:
    changes = (('receptor = "excitatory"\nprob', f'receptor = "{receptor}"\nprob'), ('"2 nS"', f"{{ law = {law} }}"))
    weights = synapses_of(read(tmp_path, *changes, (SECOND, ""))).weights
    assert len(weights) > 100 and len(weights.unique()) > 100
    magnitudes = weights if receptor == "excitatory" else -weights
    assert magnitudes.min() > 0
    assert 0.0035 < magnitudes.mean() < 0.006
    assert law == LOGNORMAL or magnitudes.max() <= 0.01


def test_a_population_of_all_others(tmp_path: Path) -> None:
    synapses = synapses_of(read(tmp_path, ('target = "excitatory"', 'target = "all others"'), (FIRST, "")))
    assert set(synapses.targets.tolist()) == {14, 15}
    assert torch.bincount(synapses.targets.long()).tolist()[14:] == [3, 3]


def test_some_projections_without_a_delay_take_one_step(tmp_path: Path) -> None:
    synapses = synapses_of(read(tmp_path, ('delay = "0.3 ms"\n', "")))
    assert synapses.delays is not None
    assert set(synapses.delays[synapses.source_of() < E].tolist()) == {np.float32(0.1)}
    assert synapses.check_delays(0.1)[0] == 1


def test_nothing_is_as_large_as_a_matrix(tmp_path: Path) -> None:
    """A matrix of 200,000 neurons would take 160 GB."""
    populations = ("[0, 14]", "[0, 150_000]"), ("[16, 20]", "[150_000, 200_000]")
    numbers = ("probability = 0.5", "number = 2\nautapses = true"), ("number = 3", "number = 1")
    config = read(tmp_path, ("count = 20", "count = 200_000"), *populations, *numbers)
    recurrent, source = open_recurrent(config), open_source(config)
    network = job.make_network(config, source, recurrent)
    assert recurrent is not None and recurrent.synapses.count == 2 * 200_000 + 150_000
    assert sum(p.numel() for p in network.parameters()) < 10**6


@pytest.mark.parametrize("connected", [True, False])
def test_several_projections_of_one_input(connected: bool, tmp_path: Path) -> None:
    """The same spikes excite some neurons and inhibit others; a group of other channels stands beside them."""
    one = 'fan_out = { receptor = "excitatory", number = 2, weight = "6 nS", seed = 9 }\n'
    several = """
[[input.fan_out]]
target = "excitatory"
receptor = "excitatory"
probability = 1.0
weight = "6 nS"
seed = 9
[[input.fan_out]]
target = "inhibitory"
receptor = "inhibitory"
probability = 1.0
weight = "1 nS"
seed = 10
[[input.more]]
spikes = { source = "poisson", seed = 5, channels = 3, rate = "50 Hz" }
fan_out = { seed = 3, probability = 1.0, weight = "2 nS", excitatory_fraction = 1.0 }
"""
    changes = [(one, several)] + ([] if connected else [(FIRST, ""), (SECOND, "")])
    path = write(tmp_path, *changes)
    config = load(path)[1]
    source = open_source(config)
    assert isinstance(source.weights, Synapses)
    dense = source.weights.to_dense()
    assert dense.shape == (N, CHANNELS + 3)
    assert (dense[:E, :CHANNELS] == np.float32(0.006)).all()
    assert (dense[16:, :CHANNELS] == -np.float32(0.001)).all()
    assert not dense[E:16, :CHANNELS].any() and (dense[:, CHANNELS:] > 0).all()
    net = torch.from_numpy(source.channels(0, T)) @ dense.T
    np.testing.assert_allclose(source.read(0, T), net, atol=1e-8)
    np.testing.assert_array_equal(source.read(130, 170), source.read(0, T)[130:170])
    assert main(["simulate", path, "--out", str(tmp_path / "out")]) == 0
    assert open_result(tmp_path / "out" / "result.zarr").spike_counts().sum() > 10


DENSE = np.array([[0, -2, 1], [3, 0, -1], [0.5, -1, 0]])
FILE = '[[projection]]\nsource = "all others"\ntarget = "inhibitory"\npath = "w.npz"\nweight = "2 nS"\nseveral'


@pytest.mark.parametrize("form", ["coo", "coo, delays", "scipy", "saved", "saved, delays"])
def test_synapses_of_a_file(form: str, tmp_path: Path) -> None:
    row, col, weight, delay = [0, 3, 1, 1], [0, 1, 0, 0], [1.0, -0.5, 2.0, 0.25], [1.0, 0.5, 2.5, 1.5]
    path = tmp_path / "w.npz"
    dense = np.zeros((INHIBITORY, 2))
    np.add.at(dense, (row, col), weight)
    if form.startswith("coo"):
        np.savez(path, row=row, col=col, weight=weight, **({"delay": np.array(delay)} if "delays" in form else {}))
    elif form == "scipy":
        sparse.save_npz(path, sparse.csr_array(dense))
    else:
        Synapses.from_coo(row, col, weight, delay if "delays" in form else None, shape=(INHIBITORY, 2)).save(path)
    table = '[[projection]]\nsource = "all others"\ntarget = "inhibitory"\npath = "w.npz"\nweight = "2 nS"\n'
    if "delays" not in form:
        table += 'delay = "0.7 ms"\n'
    config = read(tmp_path, (FIRST, table), (SECOND, ""))
    recurrent = open_recurrent(config)
    assert recurrent is not None
    synapses = recurrent.synapses
    expected = torch.zeros(N, N)
    expected[16:, 14:16] = torch.from_numpy(dense).float() * 0.002
    torch.testing.assert_close(synapses.to_dense(), expected)
    assert synapses.count == (3 if form == "scipy" else 4)  # SciPy adds up synapses of one pair
    assert synapses.delays is not None
    assert synapses.delays.tolist() == ([1.0, 2.5, 1.5, 0.5] if "delays" in form else [np.float32(0.7)])
    assert recurrent.signs.tolist() == [0] * 14 + [1, -1] + [0] * 4
    (origin,) = recurrent.provenance["projections"]
    assert (origin["target"], origin["synapses"], origin["file"]) == ("inhibitory", synapses.count, str(path))
    if "delays" in form:
        twice = table + 'delay = "0.7 ms"\n'
        with pytest.raises(UserError, match=r"projection.0: delay is given, and .*w.npz has delays as well; leave one"):
            open_recurrent(read(tmp_path, (FIRST, twice), (SECOND, "")))


def test_a_file_of_synapses_serves_all_tables(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    targets, sources = g.integers(0, N, 80), g.integers(0, N, 80)
    saved = Synapses.from_coo(targets, sources, g.integers(-3, 4, 80) / 1024, delays=0.5, shape=(N, N))
    saved.save(tmp_path / "w.npz")
    kept = synapses_of(read(tmp_path, (FIRST, '[recurrent]\npath = "w.npz"\nweight = "1 uS"\n'), (SECOND, "")))
    assert torch.equal(kept.to_dense(), saved.to_dense())
    assert (kept.shortest, kept.longest) == (0.5, 0.5)
    inputs = Synapses.from_coo(targets, sources % CHANNELS, 0.25, shape=(N, CHANNELS))
    inputs.save(tmp_path / "in.npz")
    fan_out = ('receptor = "excitatory", number = 2, weight = "6 nS", seed = 9', 'path = "in.npz", weight = "1 nS"')
    weights = open_source(read(tmp_path, fan_out)).weights
    assert isinstance(weights, Synapses)
    torch.testing.assert_close(weights.to_dense(), inputs.to_dense() / 1000)
    Synapses.from_coo(targets, sources % CHANNELS, 0.25, delays=1.0, shape=(N, CHANNELS)).save(tmp_path / "in.npz")
    with pytest.raises(UserError, match=r"input.fan_out: .*in.npz has delays, and an input arrives in the step in which"):
        open_source(read(tmp_path, fan_out))


def test_recurrent_tables_take_a_delay(tmp_path: Path) -> None:
    table = """[recurrent]
seed = 1
probability = 0.3
excitatory_fraction = 0.75
excitatory_weight = "2 nS"
inhibitory_weight = "8 nS"
"""
    plain, delayed = (
        synapses_of(read(tmp_path, (FIRST, table + delay), (SECOND, ""))) for delay in ("", 'delay = "1.5 ms"\n')
    )
    assert plain.delays is None and delayed.delays is not None
    assert torch.equal(plain.to_dense(), delayed.to_dense())
    assert delayed.delays.tolist() == [1.5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "inhibitory"', 'source = "inhibitry"', "projection.1.source must be the name of a population, got 'inhi"),
        ('target = "excitatory"', 'target = "x"', "projection.1.target must be the name of a population, got 'x'; the"),
        ('receptor = "inhibitory"\n', "", "projection.1: receptor is missing; add it"),
        ('receptor = "inhibitory"', 'receptor = "gaba"', "projection.1.receptor: should be 'excitatory' or 'inhibitory'"),
        ("number = 3", "numbr = 3", "projection.1: unknown key 'numbr'; did you mean 'number'?"),
        ("number = 3", "number = 3\nprobability = 0.1", "projection.1: probability or number says how many synapses"),
        ("number = 3\n", "", "projection.1: probability or number says how many synapses there are, got ne"),
        ("number = 3", "number = 0", "projection.1.number: should be greater than 0, got 0"),
        ("probability = 0.5", "probability = 50", "projection.0.probability: should be less than or equal to 1, got 50"),
        ('delay = "0.3 ms"', 'delay = "0.04 ms"', "projection.0.delay must be at least one step of dt = 0.1 ms, got 0.04"),
        ('delay = "0.3 ms"', 'delay = "3 mV"', "projection.0.delay: 'mV' does not measure a time; expected a time such as"),
        ('law = "uniform"', 'law = "unifrom"', "projection.1.weight: law must be one of 'uniform', 'normal', 'lognorm"),
        ('low = "4 nS"', 'low = "10 nS"', "projection.1.weight: low must not be above high, got 0.01 and 0.009"),
        ('low = "4 nS", ', "", 'projection.1.weight: low is missing; add it, such as low = "2 nS"'),
        ('std = "1 ms"', 'sd = "1 ms"', "projection.1.delay: unknown key 'sd'; did you mean 'std'?"),
        ('"2 nS"', '"-2 nS"', "projection.0.weight: must not be negative, got '-2 nS'"),
        ("seed = 9", "seed = 2", "seed must differ between all projections and fan_outs, got 2 twice"),
        ('weight = "6 nS", seed', 'delay = "1 ms", weight = "6 nS", seed', "input.fan_out: unknown key 'delay'"),
        ("number = 2", 'target = "exc", number = 2', "input.fan_out.target must be the name of a population, got 'exc'"),
        ("[input]", '[recurrent]\npath = "w.npz"\nweight = "1 nS"\n[input]', "recurrent and projection both connect the"),
    ],
)  # fmt: skip
def test_message(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"test.toml: {message}")):
        read(tmp_path, (old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("number = 3", "number = 5", "projection.1: number must be at most 4, the sources to choose from, got 5; write"),
        ('"2 ms", std = "1 ms", low = "0.5 ms"', '"0.1 ms", std = "0.2 ms"', "projection: a delay must be at least one"),
        ("probability = 0.5", "number = 5", "projection.0: number cannot be kept between all neurons and"),
        (FIRST, '[[projection]]\npath = "w.npz"\nweight = "1 nS"\n', "projection.0: row in "),
        (FIRST, '[[projection]]\npath = "w.npz"\nsource = "inhibitory"\nweight = "1 nS"\n', "projection.0: row in "),
        (FIRST, '[[projection]]\npath = "d.npz"\nweight = "1 nS"\n', "projection.0: delay in "),
        (FIRST, '[[projection]]\npath = "s.npz"\nweight = "1 nS"\n', "must have the shape [20, 20], rows post-synaptic"),
        (FIRST, '[[projection]]\npath = "bad.npz"\nweight = "1 nS"\n', "holds no synapses, or is damaged"),
    ],
)  # fmt: skip
def test_what_is_found_out_later(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "w.npz", row=[0, N], col=[0, 0], weight=[1.0, 1.0])
    np.savez(tmp_path / "d.npz", row=[0, 1], col=[0, 0], weight=[1.0, 1.0], delay=[1.0])
    Synapses.from_coo([0], [0], 1.0, shape=(N, N - 1)).save(tmp_path / "s.npz")
    np.savez(tmp_path / "bad.npz", about="{}", indptr=[0], targets=[0], weights=[0])
    path = write(tmp_path, (old, new))
    assert main(["simulate", path, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coba-triton: ") and error.count("\n") == 1
    assert message in error


def test_summary_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert main(["simulate", path, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    config = load(path)[1]
    synapses = synapses_of(config)
    assert summary["recurrent"]["synapses"] == synapses.count
    assert summary["recurrent"]["input_synapses"] == 2 * N
    first, second = summary["recurrent"]["projections"]
    assert first == {"source": "excitatory", "target": None, "synapses": synapses.count - 3 * E, "seed": 1}
    assert (second["source"], second["target"], second["synapses"]) == ("inhibitory", "excitatory", 3 * E)
    seeds = {"projection.0.seed": 1, "projection.1.seed": 2, "input.spikes.seed": 2, "input.fan_out.seed": 9}
    assert summary["seeds"] == seeds
    assert Config.model_validate(summary["config"]) == config
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{synapses.count} (2 projections)" in printed.out


def test_a_run_is_extended_and_another_network_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert main(["simulate", path, "--out", str(tmp_path / "whole")]) == 0
    short = write(tmp_path, ('duration = "60 ms"', 'duration = "35 ms"'))
    assert main(["simulate", short, "--out", str(tmp_path / "out")]) == 0
    assert main(["simulate", write(tmp_path), "--out", str(tmp_path / "out"), "--resume"]) == 0
    one, other = (open_result(tmp_path / name / "result.zarr") for name in ("whole", "out"))
    np.testing.assert_array_equal(one.spikes[:], other.spikes[:])
    assert torch.equal(one.state.history, other.state.history)  # type: ignore[union-attr]
    capsys.readouterr()
    longer = write(tmp_path, ('delay = "0.3 ms"', 'delay = "0.4 ms"'), ('duration = "60 ms"', 'duration = "70 ms"'))
    assert main(["simulate", longer, "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert "was begun with another configuration" in capsys.readouterr().err
