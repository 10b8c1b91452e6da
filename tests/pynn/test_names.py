"""How scripts find the simulator, and what it says of what it has not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import pyNN
from pyNN import errors, standardmodels

import coba_triton.pynn as sim

SCRIPT = """
import sys
from pyNN.utility import get_simulator
import beside
sim, options = get_simulator(("--cells", "how many", {"type": int}))
sim.setup()
cells = sim.Population(options.cells, sim.IF_cond_exp(i_offset=1.0))
cells.record("spikes")
sim.run(50.0)
print(sim.__name__, __name__, options.simulator, cells.mean_spike_count() > 0, beside.HERE, sys.argv[0][-9:])
"""


def test_one_module_under_both_names() -> None:
    import pyNN.coba_triton as other
    from pyNN.coba_triton import Population

    assert other is sim is pyNN.coba_triton is importlib.import_module("pyNN.coba_triton")
    assert Population is sim.Population and sim.__name__ == "coba_triton.pynn" and sim.simulator.name == "coba_triton"


def test_scripts_that_ask_for_a_simulator_by_name(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("HERE = 'beside'")
    command = [sys.executable, "-m", "coba_triton.pynn", str(tmp_path / "script.py"), "coba_triton", "--cells", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "coba_triton.pynn __main__ coba_triton True beside script.py\n", done.stderr


def test_one_line_within_pynn_is_enough(tmp_path: Path) -> None:
    """The file that the documentation offers to PyNN, in a folder that stands for PyNN's."""
    (tmp_path / "coba_triton.py").write_text("from coba_triton.pynn import *\n")
    (tmp_path / "beside.py").write_text("HERE = 'beside'")
    code = f"import pyNN, sys; pyNN.__path__.append({str(tmp_path)!r}); sys.path.append({str(tmp_path)!r})\n{SCRIPT}"
    command = [sys.executable, "-c", code, "coba_triton", "--cells", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "coba_triton.pynn __main__ coba_triton True beside -c\n", done.stderr


def test_a_script_has_to_be_named() -> None:
    done = subprocess.run([sys.executable, "-m", "coba_triton.pynn"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "usage: python -m coba_triton.pynn SCRIPT ARGS" in done.stderr


def test_the_names_of_pynn_are_there() -> None:
    """All classes and functions that PyNN's own simulator for tests defines or takes from PyNN's documented modules."""
    import pyNN.mock

    documented = ("pyNN.mock", "pyNN.random", "pyNN.space", "pyNN.network", "pyNN.common", "pyNN.connectors")
    names = {n for n, v in vars(pyNN.mock).items() if getattr(v, "__module__", "").startswith(documented)}
    assert len(names) > 60
    bases = {"AbstractRNG", "Connector", "FixedNumberConnector", "MapConnector", "MockCurrentSource"}
    assert names - set(vars(sim)) == bases | {"state"}
    assert all(hasattr(sim, name) for name in sim.__all__)
    assert {"IF_cond_exp", "SpikeSourceArray", "SpikeSourcePoisson", "SpikeSourceGamma"} <= {*sim.list_standard_models()}


@pytest.mark.parametrize(
    "name",
    ["IF_curr_alpha", "EIF_cond_exp_isfa_ista", "HH_cond_exp", "Izhikevich", "STDPMechanism", "TsodyksMarkramSynapse"],
)
def test_models_that_there_are_not_say_what_there_is(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"{name} is not available in coba_triton.pynn: .*IF_cond_exp.*StaticSyn"):
        getattr(sim, name)(tau_m=10.0)


def test_models_of_other_simulators_are_refused() -> None:
    sim.setup()
    with pytest.raises(errors.InvalidModelError, match="must be of a cell type of coba_triton.pynn"):
        sim.Population(1, standardmodels.cells.IF_cond_exp())
    cells = sim.Population(1, sim.IF_cond_exp())
    with pytest.raises(
        errors.InvalidModelError,
        match="the synapse type must be StaticSynapse or SimpleStochasticSynapse of coba_triton.pynn",
    ):
        sim.Projection(cells, cells, sim.AllToAllConnector(), _foreign_synapse())


def _foreign_synapse() -> object:
    class Foreign(standardmodels.synapses.StaticSynapse):
        translations = sim.StaticSynapse.translations

        def _get_minimum_delay(self) -> float:
            return 0.1

    return Foreign(weight=0.1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(tau_m=0.0), "tau_m of IF_cond_exp must be positive, got 0"),
        (dict(cm=-0.25), "cm of IF_cond_exp must be positive, got -0.25"),
        (dict(tau_refrac=-1.0), "tau_refrac of IF_cond_exp must not be negative, got -1"),
        (dict(v_rest=float("nan")), "v_rest of IF_cond_exp must be finite, got nan"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_parameters_with_which_nothing_can_run(parameters: dict[str, float], message: str) -> None:
    sim.setup()
    with pytest.raises(errors.InvalidParameterValueError, match=message):
        sim.Population(2, sim.IF_cond_exp(**parameters))
    cells = sim.Population(2, sim.IF_cond_exp())
    with pytest.raises(errors.InvalidParameterValueError, match=message):
        cells[1:2].set(**parameters)
    assert np.isfinite(cells.get("v_rest")) and cells.get("tau_m") == 20.0


@pytest.mark.parametrize("times", [[2.0, 1.0], [-1.0, 1.0], [1.0, float("nan")]], ids=str)
def test_spike_times_that_cannot_be_sent(times: list[float]) -> None:
    sim.setup()
    with pytest.raises(errors.InvalidParameterValueError, match="spike_times of SpikeSourceArray must be times from 0 on"):
        sim.Population(2, sim.SpikeSourceArray(spike_times=times))
    sources = sim.Population(2, sim.SpikeSourceArray(spike_times=[1.0]))
    with pytest.raises(errors.InvalidParameterValueError, match="spike_times of SpikeSourceArray must be times from 0 on"):
        sources.set(spike_times=times)


def test_rates_are_not_negative_nor_too_high() -> None:
    sim.setup()
    with pytest.raises(
        errors.InvalidParameterValueError, match="rate of SpikeSourcePoissonRefractory must be below 1 / tau"
    ):
        sim.Population(2, sim.SpikeSourcePoissonRefractory(rate=200.0, tau_refrac=5.0))
    with pytest.raises(errors.InvalidParameterValueError, match="rate of SpikeSourcePoisson must not be negative, got -5"):
        sim.Population(2, sim.SpikeSourcePoisson(rate=-5.0))


def test_names_of_parameters_and_states() -> None:
    sim.setup()
    cells = sim.Population(2, sim.IF_cond_exp())
    with pytest.raises(errors.NonExistentParameterError, match="tau_x .valid parameters for IF_cond_exp are: cm, "):
        cells.get("tau_x")
    with pytest.raises(errors.NonExistentParameterError):
        cells.set(tau_x=1.0)
    with pytest.raises(errors.NonExistentParameterError, match="isyn_exc"):
        cells.initialize(isyn_exc=1.0)
    with pytest.raises(errors.InvalidParameterValueError, match="the initial values of v must be finite"):
        cells.initialize(v=float("inf"))
    with pytest.raises(errors.InvalidDimensionsError, match="at least one cell, got 0"):
        sim.Population(0, sim.IF_cond_exp())


def test_synapses_that_cannot_be() -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(2, sim.IF_cond_exp())
    sources = sim.Population(2, sim.SpikeSourcePoisson())
    for synapse, receptor, message in (
        (dict(weight=-0.1), "inhibitory", "not negative, got -0.1|Weights must be positive"),
        (dict(weight=0.1, delay=0.04), "excitatory", "a delay must be at least one time step of 0.1 ms, got 0.04 ms"),
        (dict(weight=0.1, delay=-1.0), "excitatory", "a delay must be at least one time step of 0.1 ms, got -1 ms"),
        (dict(weight=0.1), "NMDA", "receptor_types must be one of"),
    ):
        with pytest.raises(errors.ConnectionError, match=message):
            sim.Projection(cells, cells, sim.AllToAllConnector(), sim.StaticSynapse(**synapse), receptor_type=receptor)
    for post in (sources, cells + sources):
        with pytest.raises(errors.ConnectionError, match="SpikeSourcePoisson is a source of spikes and cannot receive any"):
            sim.Projection(cells, post, sim.AllToAllConnector(), sim.StaticSynapse(weight=0.1))
    sim.setup(timestep=0.1)
    with pytest.raises(errors.ConnectionError, match="belongs to a network before the last setup"):
        sim.Projection(cells, cells[0:1] + cells[1:2], sim.AllToAllConnector(), sim.StaticSynapse(weight=0.1))
    cells = sim.Population(2, sim.IF_cond_exp())
    with pytest.raises(errors.ConnectionError, match="source index out of range"):
        sim.Projection(cells, cells, sim.FromListConnector([(2, 0, 0.1, 0.1)]))
    assert not sim.simulator.state.engine.projections
    others = sim.Population(2, sim.IF_curr_exp())
    for receptor, weight in (("excitatory", -0.1), ("inhibitory", 0.1)):
        right = sim.StaticSynapse(weight=-weight)
        projection = sim.Projection(cells, others, sim.AllToAllConnector(), right, receptor_type=receptor)
        with pytest.raises(errors.ConnectionError, match="weights must be finite currents in nA and not"):
            projection.set(weight=weight)
    projection = sim.Projection(cells, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=0.1))
    with pytest.raises(errors.ConnectionError, match="not negative, got -0.02"):
        projection.set(weight=-0.02)
    with pytest.raises(errors.ConnectionError, match="not negative, got -0.02"):
        projection[0].weight = -0.02
    with pytest.raises(errors.ConnectionError, match="a delay must be at least one time step"):
        projection.set(delay=0.0)
    assert set(projection.get("weight", "list", with_address=False)) == {0.1}


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4")
    with pytest.raises(RuntimeError, match=r"one process, got 4 of MPI, .* use coba_triton.distributed for networks over"):
        sim.setup()
    monkeypatch.setenv(name, "1")
    assert sim.setup() == 0 and sim.num_processes() == 1 and sim.rank() == 0


def test_arguments_of_setup() -> None:
    threads = sim.simulator.state.threads
    sim.setup(
        timestep=0.1, filename="x.xml", label="VA", t_flush=1.0, verbosity="error", spike_precision="on_grid", threads=1
    )
    sim.setup(backend="cpu", device="cpu", dtype="float32")
    import torch

    assert torch.get_num_threads() == threads and sim.simulator.state.engine.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be 'float64' or 'float32', got 'float16'"):
        sim.setup(dtype="float16")
    with pytest.raises(ValueError, match="backend must be 'cpu' or 'triton' for networks of PyNN, got 'reference'"):
        sim.setup(backend="reference")
    with pytest.raises(Exception, match="dt is not a valid argument for setup"):
        sim.setup(dt=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(timestep=0), ValueError, "timestep must be a positive finite number of ms, got 0"),
        (dict(timestep=-0.1), ValueError, "timestep must be a positive finite number of ms, got -0.1"),
        (dict(timestep=float("nan")), ValueError, "timestep must be a positive finite number of ms, got nan"),
        (dict(timestep=float("inf")), ValueError, "timestep must be a positive finite number of ms, got inf"),
        (dict(timestep="0.1"), TypeError, "timestep must be a positive finite number of ms, got str"),
        (dict(min_delay=float("nan")), ValueError, "min_delay must be a positive finite number of ms, got nan"),
        (dict(min_delay="least"), ValueError, "min_delay must be 'auto' or a positive finite number of ms, got 'least'"),
        (dict(min_delay=None), TypeError, "min_delay must be a positive finite number of ms, got NoneType"),
        (dict(max_delay=-1.0), ValueError, "max_delay must be a positive finite number of ms, got -1.0"),
        (dict(max_delay=float("nan")), ValueError, "max_delay must be a positive finite number of ms, got nan"),
        (dict(rng_seed=-1), ValueError, "rng_seed must be an int of at least 0, got -1"),
        (dict(rng_seed=1.5), TypeError, "rng_seed must be an int of at least 0, got float"),
        (dict(rng_seed="x"), TypeError, "rng_seed must be an int of at least 0, got str"),
        (dict(rng_seed=None), TypeError, "rng_seed must be an int of at least 0, got NoneType"),
        (dict(threads=-2), ValueError, "threads must be a positive int, got -2"),
        (dict(threads=1.5), TypeError, "threads must be a positive int, got float"),
        (dict(dtype=np.zeros(2)), ValueError, "dtype must be 'float64' or 'float32', got array"),
        (dict(backend=1), ValueError, "backend must be one of 'auto', 'reference', 'triton', 'cpu', got 1"),
        (dict(device="nowhere"), ValueError, "device must be a device of torch, such as 'cpu' or 'cuda', got 'nowhere'"),
    ],
    ids=str,
)
def test_values_of_setup_that_cannot_be(options: dict[str, object], error: type[Exception], message: str) -> None:
    """They are refused by name, and the network of before stays as it is."""
    sim.setup(timestep=0.2, min_delay=0.4)
    cells = sim.Population(1, sim.IF_cond_exp())
    cells.record("v")
    with pytest.raises(error, match=message):
        sim.setup(**{"timestep": 0.1, **options})
    assert (sim.get_time_step(), sim.get_min_delay()) == (0.2, 0.4) and sim.run(1.0) == 1.0
    assert len(cells.get_data().segments[0].analogsignals[0]) == 6


def test_numbers_of_numpy_are_taken_by_setup() -> None:
    sim.setup(np.float32(0.5), np.float64(0.5), max_delay=np.int64(3), rng_seed=np.int64(7), threads=None)
    assert (sim.get_time_step(), sim.get_min_delay(), sim.get_max_delay()) == (0.5, 0.5, 3.0)


def test_steps_that_are_too_long_do_not_pass_in_silence() -> None:
    sim.setup(timestep=1.0)
    sim.Population(3, sim.IF_cond_exp(tau_syn_E=0.4))
    with pytest.warns(UserWarning, match="the Euler step is unstable: dt . tau_syn_exc_inv is 2.5"):
        sim.run(1.0)
    sim.setup(timestep=0.1)
    source = sim.Population(1, sim.SpikeSourceArray(spike_times=[1.0, 21.0]))
    cells = sim.Population(5, sim.IF_cond_exp(v_thresh=1e300))
    projection = sim.Projection(source, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=12.0, delay=0.1))
    with pytest.warns(UserWarning, match=r"the Euler step overshoots: timestep / cm . .* has reached 1.21 by 1.2 ms"):
        sim.run(1.2)
    sim.run(19.0)
    projection.set(weight=1e200)
    with pytest.raises(FloatingPointError, match=r"the state is no longer finite at 25.2 ms; make the time step"):
        sim.run(5.0)
