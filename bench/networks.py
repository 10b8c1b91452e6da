"""Sparse networks beside their peers, on the same synapses, first potentials and input.

    python bench/networks.py va.npz --seconds 5
    python bench/networks.py va.npz --seconds 5 --rounds 5 --brian2 brian2/bin/python --nest nest/bin/python
    python bench/networks.py coba2005.npz --seconds 10 --brainevent brainevent/bin/python
    python bench/networks.py va1m.npz --seconds 0.1 --threads 2
    python bench/networks.py coba2005.npz --seconds 10 --device cuda

``bench/peers`` makes the files and says how to install the peers. Every run is a process of its own. The runs of a round
follow each other, and the table has medians over the rounds with the least and the greatest value. Speed is biological
seconds per second: of the processor's time, and of the clock's. Only the steps are timed, after a first call that compiles.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
COLUMNS = ("by_cpu", "by_wall", "rate_exc", "rate_inh", "cv", "memory_mb")


def arguments_of(net: Any, steps: int, kind: Any, device: str) -> dict[str, Any]:
    """The arguments of `coba_lif_integral` for a network of `bench/peers/network.py`."""
    import numpy as np
    import torch

    from coba_triton import CobaLIFParameters, CobaLIFState, Synapses

    dt = net.dt
    p = CobaLIFParameters(
        1 / net.tau_exc, 1 / net.tau_inh, 1 / net.c_m, net.g_l, net.e_inh, net.e_exc,
        net.v_rest + net.i_offset / net.g_l, net.v_reset, net.v_thresh, refractory=net.refractory,
    )  # fmt: skip
    delay = net.delay + dt  # a spike of step t is an input of step t + d here, and one step later there
    # a source has one weight, as in the populations that it stands for
    first = np.searchsorted(net.sources, np.arange(net.n))
    of_source = torch.from_numpy(net.weights[np.minimum(first, len(net.weights) - 1)])[:, None]
    synapses = Synapses.from_coo(net.targets, net.sources, of_source, delay, shape=(net.n, net.n)).to(device, kind)
    count = int(net.input_sources.max()) + 1 if len(net.input_sources) else 0
    inputs = Synapses.from_coo(net.input_targets, net.input_sources, net.input_weights, shape=(net.n, count)).to(
        device, kind
    )
    x = torch.zeros(steps, 1, count, dtype=torch.uint8)
    at = np.round((net.spike_times + net.delay) / dt).astype(np.int64)
    at, sources = (torch.from_numpy(each[at < steps]).long() for each in (at, net.spike_sources))
    x.index_put_((at, torch.tensor(0), sources), x.new_ones(()), True)
    state = CobaLIFState(0.0, torch.from_numpy(net.v0)[None].to(device, kind), 0.0, 0.0)
    weights = {"input_weights": inputs, "recurrent_weights": synapses}
    return {"input_tensor": x.to(device), "state": state, **weights, "p": p, "dt": dt, "spike_dtype": "bits"}


def run_here(path: str, seconds: float, threads: int, dtype: str, device: str, spikes_to: str | None) -> dict[str, Any]:
    """One run of this package; returns what the peers' scripts print."""
    import numpy as np
    import torch

    import coba_triton
    from coba_triton import coba_lif_integral, unpack_spikes
    from coba_triton.tools.contenders import synchronize

    sys.path.insert(0, str(PEERS))
    from network import describe, load

    torch.set_num_threads(threads)
    net = load(path)
    steps, dt = round(seconds * 1000 / net.dt), net.dt
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arguments = arguments_of(net, steps, getattr(torch, dtype), device)
    x, state = arguments.pop("input_tensor"), arguments.pop("state")
    synapses = arguments["recurrent_weights"]
    del net.sources, net.targets, net.weights
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where = x.device
    coba_lif_integral(x[:32], state, **arguments)  # compiles
    block = 3200
    wall = cpu = 0.0
    rows, cells, packed = [], [], []
    for begin in range(0, steps, block):  # nothing else in between: PyTorch's threads keep their processors busy for a while
        part = x[begin : begin + block]
        synchronize(where)
        clock, processor = time.perf_counter(), time.process_time()
        words, state = coba_lif_integral(part, state, **arguments)
        synchronize(where)
        wall, cpu = wall + time.perf_counter() - clock, cpu + time.process_time() - processor
        packed.append((begin, len(part), words))
    for begin, length, words in packed:
        fired = unpack_spikes(words.cpu(), length)[:, 0].nonzero()
        rows.append(fired[:, 0].numpy() + begin)
        cells.append(fired[:, 1].numpy())
    times, neurons = np.concatenate(rows) * dt, np.concatenate(cells)
    if spikes_to is not None:
        np.savez(spikes_to, times=times, neurons=neurons)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peer": "coba_triton", "mode": device, "dtype": dtype, "threads": threads, "neurons": net.n,
        "synapses": synapses.count, "bytes_per_synapse": (synapses.nbytes - synapses.indptr.nbytes) / synapses.count,
        "seconds": seconds, "wall": wall, "cpu": cpu, "spikes": len(times), **describe(times, neurons, net, seconds),
        "memory_mb": peak / 1024, "memory_of_run_mb": (peak - made) / 1024, "memory_before_mb": before / 1024,
        "versions": {"coba_triton": coba_triton.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip


def measure(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["by_cpu"], found["by_wall"] = (found["seconds"] / found[name] for name in ("cpu", "wall"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a network of bench/peers/network.py")
    parser.add_argument("--seconds", type=float, default=1.0, help="biological seconds (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of this package (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="of this package (%(default)s)")
    parser.add_argument("--pin", help="run one-thread processes on this processor, as taskset takes it")
    parser.add_argument("--brian2", help="the Python with Brian2")
    parser.add_argument("--nest", help="the Python with NEST")
    parser.add_argument("--brainevent", help="the Python with brainevent")
    parser.add_argument("--build", default="build", help="the folder for what Brian2 compiles (%(default)s)")
    parser.add_argument("--spikes", help="write the spikes of a single run here, and print its JSON alone")
    parser.add_argument("--json", help="write all runs here")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone or options.spikes:
        found = run_here(options.file, options.seconds, options.threads[0], options.dtype, options.device, options.spikes)
        print(json.dumps(found))
        return
    tail = [options.file, "--seconds", str(options.seconds)]
    pin = ["taskset", "-c", options.pin] if options.pin else []
    own = [sys.executable, __file__, *tail, "--alone", "--dtype", options.dtype, "--device", options.device, "--threads"]
    commands = {f"coba_triton, threads: {n}": [*(pin if n == 1 else []), *own, str(n)] for n in options.threads}
    if options.brian2:
        build = ["--directory", str(Path(options.build) / Path(options.file).stem)]
        commands["Brian2"] = [*pin, options.brian2, str(PEERS / "brian2_va.py"), *tail, *build]
    if options.nest:
        commands["NEST"] = [*pin, options.nest, str(PEERS / "nest_va.py"), *tail]
    if options.brainevent:
        commands["brainevent"] = [*pin, options.brainevent, str(PEERS / "brainevent_coba.py"), *tail]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            runs[name].append(measure(command))
            print(
                f"{name}: {runs[name][-1]['by_cpu']:.3g} by processor, {runs[name][-1]['by_wall']:.3g} by clock", flush=True
            )
    print(f"{'':26}" + "".join(f"{column:>24}" for column in COLUMNS))
    for name, found in runs.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in found]
            cells.append(f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]")
        print(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))
    if options.json:
        Path(options.json).write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
