"""Networks of sparse synapses for tests of a backend, and what a plain loop over steps and synapses makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coba_triton import CobaLIFParameters
from coba_triton.backend import reference
from coba_triton.neuron.records import Constants, Drive, State, Sums
from coba_triton.ops.call import Outputs, Projection, SparseNetwork, SparseSweep
from coba_triton.ops.constants import derive_constants
from coba_triton.ops.grid import make_grid
from coba_triton.ops.spikes import pack_spikes
from coba_triton.tools.problems import DT, VALUES
from helpers.devices import to_device

PER_MS = 1 / DT
CPU = torch.device("cpu")


def projection(
    sources: int,
    neurons: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    fan_out: int = 12,
    steps: tuple[int, int] | None = None,
    per: str = "synapse",
    exact: bool = False,
    narrow: bool = False,
    size: float = 0.02,
) -> Projection:
    """Random synapses, from none to twice ``fan_out`` of a source, of both signs, several of some pairs.

    Args:
        steps: the shortest and the longest delay in steps; both occur. None: no delays.
        per: what has a weight and a delay of its own: a ``synapse``, a ``source``, or the whole ``network``.
        exact: weights are whole numbers of 2**-10, so that sums of floats are exact as well.
        narrow: take 32-bit sums where they are exact.
    """
    degrees = torch.randint(0, 2 * fan_out + 1, (sources,), generator=generator)
    degrees[: sources // 2 : 5] = 0
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
    count = int(indptr[-1])
    # squares: neurons with a small index have many synapses, several of them from one source
    targets = (torch.rand(count, generator=generator) ** 2 * neurons).long()
    source = torch.repeat_interleave(torch.arange(sources), degrees)
    targets = targets[torch.argsort(source * neurons + targets)]
    shape = {"synapse": (count,), "source": (sources, 1), "network": (1,)}[per]
    weights = torch.randn(shape, generator=generator, dtype=torch.float64) * size
    if exact:
        weights = torch.round(weights * 1024) / 1024
    if per != "network":
        weights.view(-1)[::7] = 0.0
    else:
        weights.abs_()
    delays = None
    if steps is not None:
        drawn = torch.randint(steps[0], steps[1] + 1, shape, generator=generator)
        if per != "network":
            drawn.view(-1)[::3], drawn.view(-1)[1::3] = steps
        # not exactly on the grid of steps: a delay is rounded
        delays = (drawn + torch.rand(shape, generator=generator) * 0.8 - 0.4) * DT
        delays = delays.float()
    weights = weights.to(dtype)
    grid = make_grid(weights, indptr, targets, neurons, narrow)
    return Projection(indptr, targets.int(), weights, delays, grid)


class Connected:
    """A projection, a number for each synapse."""

    def __init__(self, projection: Projection) -> None:
        indptr, targets, weights, delays, grid = projection
        self.sources = torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
        self.targets = targets.long()
        self.weights = self._each(weights)
        self.steps = None if delays is None else torch.round(self._each(delays) * PER_MS).long()
        self.scales = grid.scales

    def _each(self, numbers: Tensor) -> Tensor:
        if numbers.dim() == 2:
            return numbers[self.sources, 0]
        return numbers.expand(len(self.sources)) if len(numbers) == 1 else numbers

    def integers(self, values: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """What each synapse adds for the value ``[B, S]`` of its source."""
        scale = torch.where(self.weights < 0, self.scales[1], self.scales[0]).double()
        return torch.round((self.weights.abs().double() * values.double()) * (scale / unit)).long()

    def exact_drive(self, values: Tensor, neurons: int, unit: Tensor | float = 1.0) -> Drive:
        """Sums of integers, rounded once."""
        integers, signed = self.integers(values, unit), []
        for sign in range(2):
            own = (self.weights < 0) == bool(sign)
            sums = torch.zeros(len(values), neurons, dtype=torch.int64).index_add(1, self.targets[own], integers[:, own])
            inverse = self.scales[2 + sign].double() * unit
            signed.append((sums.to(self.weights.dtype).double() * inverse).to(self.weights.dtype))
        return Drive(*signed)

    def float_drive(self, values: Tensor, weights: Tensor, neurons: int) -> Drive:
        """Sums of floats that autograd follows."""
        zeros = torch.zeros(len(values), neurons, dtype=weights.dtype)
        return Drive(*(zeros.index_add(1, self.targets, torch.relu(signed) * values) for signed in (weights, -weights)))


@dataclass
class SparseProblem:
    """A network, its state, the spikes before the first step, and its input ``x [T, B, I]``.

    All tensors are on the CPU, and so are all results. The backend runs on ``device``.
    """

    net: SparseNetwork
    x: Tensor
    drive: Tensor | None
    state: Tensor
    history: Tensor
    device: torch.device = CPU

    @property
    def recurrent(self) -> Connected:
        return Connected(self.net.recurrent)

    def table(self) -> Constants:
        """The constants, as the reference takes them."""
        batch, neurons = self.state.shape[1:]
        columns = self.net.constants
        return Constants(*(row if len(row) == 1 else row.view(batch, neurons) for row in columns))

    def with_backend(self, backend: Any) -> SparseProblem:
        return replace(self, net=self.net._replace(backend=backend))

    def on_device(self) -> SparseProblem:
        """The same with all tensors where the backend runs."""
        return SparseProblem(*to_device((self.net, self.x, self.drive, self.state, self.history), self.device), self.device)

    # What a plain loop makes of it

    def expected(self) -> dict[str, Tensor]:
        """Spikes, states of all steps, and the final state."""
        net, recurrent, c = self.net, self.recurrent, self.table()
        longest, neurons = net.longest, net.neurons
        sent = list(self.history)
        s: Any = _record(self.state)
        states = []
        for t in range(len(self.x)):
            assert recurrent.steps is not None
            values = torch.stack(sent)[longest + t - recurrent.steps, :, recurrent.sources].t()
            arriving = recurrent.exact_drive(values, neurons)
            done = reference.step(s, self._input(t), arriving, c, net.jump_first, "super")
            sent.append(done.z)
            s = _record(_fields(done))
            states.append(_fields(done))
        return {"spikes": torch.stack(sent[longest:]), "states": torch.stack(states, 1), "final": states[-1]}

    def _input(self, t: int) -> Drive:
        if self.drive is not None:
            return Drive(*self.drive[:, t])
        if self.net.inputs is None:
            zeros = torch.zeros_like(self.state[0])
            return Drive(zeros, zeros)
        inputs, x = Connected(self.net.inputs), self.x[t].to(self.state.dtype)
        largest = x.abs().amax(1, keepdim=True).double()
        finite = torch.isfinite(largest)
        unit = 2.0 ** torch.ceil(torch.log2(torch.where(finite, largest, 1.0).clamp(min=1.0)))
        drive = inputs.exact_drive(torch.where(finite, x, 0)[:, inputs.sources], self.net.neurons, unit)
        return Drive(*(torch.where(finite, signed, torch.nan) for signed in drive))

    def expected_gradients(self, loss: dict[str, Tensor], method: str, samples: int) -> dict[str, Tensor]:
        """Autograd's, of sums of floats."""
        net, recurrent = self.net, self.recurrent
        inputs = None if net.inputs is None else Connected(net.inputs)
        batch, neurons, longest = self.state.shape[1], net.neurons, net.longest
        leaves = {
            "x": self.x,
            "state": self.state,
            "history": self.history,
            "constants": net.constants.expand(-1, batch * neurons),
            "recurrent": recurrent.weights.expand(samples, -1),
            "inputs": torch.zeros(samples, 0) if inputs is None else inputs.weights.expand(samples, -1),
        }
        leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
        c = Constants(*(row.view(batch, neurons) for row in leaves["constants"]))
        group = torch.arange(batch) // (batch // samples)

        def drive(synapses: Connected, values: Tensor, weights: Tensor) -> Drive:
            rows = [synapses.float_drive(values[b : b + 1], weights[group[b]], neurons) for b in range(batch)]
            return Drive(torch.cat([row.e for row in rows]), torch.cat([row.i for row in rows]))

        sent = list(leaves["history"])
        s: Any = _record(leaves["state"])
        states = []
        for t in range(len(self.x)):
            values = torch.stack(sent)[longest + t - recurrent.steps, :, recurrent.sources].t()
            arriving = drive(recurrent, values, leaves["recurrent"])
            own = self._input(t)
            if inputs is not None:
                own = drive(inputs, leaves["x"][t][:, inputs.sources], leaves["inputs"])
            done = reference.step(s, own, arriving, c, net.jump_first, method)
            sent.append(done.z)
            s = _record(_fields(done))
            states.append(_fields(done)[:3])
        spikes = torch.stack(sent[longest:])
        assert torch.equal(spikes, self.expected()["spikes"])
        total = (spikes * loss["spikes"]).sum() + (torch.stack(states, 1) * loss["states"]).sum()
        total = total + (states[-1] * loss["final"]).sum()
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    # What the backend makes of it

    def run(self, cuts: tuple[int, ...] = (), spike_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Spikes, states and the final state, in blocks that end at ``cuts``; buffers are poisoned."""
        return to_device(self.on_device()._run(cuts, spike_dtype), CPU)

    def _run(self, cuts: tuple[int, ...], spike_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What :meth:`run` returns, on the device, where all tensors are."""
        net, device = self.net, self.device
        steps, (fields, batch, neurons) = len(self.x), self.state.shape
        dtype = net.constants.dtype
        spikes = torch.full((steps, batch, neurons), 77, dtype=spike_dtype or dtype, device=device)
        states = torch.full((fields, steps, batch, neurons), torch.nan, dtype=dtype, device=device)
        ring = net.backend.sparse_ring(net, self.history)
        state, packed = self.state, []
        self.checkpoints: list[Tensor] = []
        for begin, end in _blocks(cuts, steps):
            self.checkpoints.append(state)
            words = torch.full((-(-(end - begin) // 32), batch, neurons), -1, dtype=torch.int32, device=device)
            every = torch.full((fields, end - begin, batch, neurons), torch.nan, dtype=dtype, device=device)
            out = Outputs(spikes[begin:end], words, every)
            drive = None if self.drive is None else self.drive[:, begin:end].contiguous()
            state = net.backend.sparse_block(net, ring, begin, self.x[begin:end], drive, state, out)
            states[:, begin:end] = every
            assert torch.equal(words, pack_spikes(spikes[begin:end]))
            packed.append(words)
        self.words = packed
        return {"spikes": spikes, "states": states, "final": state}

    def gradients(self, loss: dict[str, Tensor], method: str, samples: int, cuts: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """By everything, block by block; the forward ran before in the same blocks."""
        return to_device(self.on_device()._gradients(to_device(loss, self.device), method, samples, cuts), CPU)

    def _gradients(self, loss: dict[str, Tensor], method: str, samples: int, cuts: tuple[int, ...]) -> dict[str, Tensor]:
        """What :meth:`gradients` returns, likewise."""
        net, device = self.net, self.device
        steps, (_, batch, neurons), longest = len(self.x), self.state.shape, net.longest
        dtype = net.constants.dtype
        spikes = self._run(cuts)["spikes"]
        before = torch.cat([self.history, spikes])
        synapses = len(net.recurrent.targets)
        lam = torch.zeros_like(self.state)
        lam[:3] = loss["final"] + loss["states"][:, -1]
        sweep = SparseSweep(
            method,
            samples,
            lam,
            torch.zeros(len(Sums._fields), batch * neurons, dtype=dtype, device=device),
            torch.zeros(samples, synapses, dtype=dtype, device=device),
            torch.zeros(samples, 0 if net.inputs is None else len(net.inputs.targets), dtype=dtype, device=device),
            {},
        )
        if net.inputs is None:
            sweep = sweep._replace(inputs=None)
        grad_x = torch.full(self.x.shape, torch.nan, dtype=dtype, device=device)
        adjoints = torch.zeros(longest, batch, 2, neurons, dtype=dtype, device=device)
        for (begin, end), words, state in reversed(
            list(zip(_blocks(cuts, steps), self.words, self.checkpoints, strict=True))
        ):
            here = torch.full((end - begin, batch, 2, neurons), torch.nan, dtype=dtype, device=device)
            adjoints = torch.cat([here, adjoints[:longest]])
            by_states = torch.zeros(3, end - begin, batch, neurons, dtype=dtype, device=device)
            by_states[:, max(0, 1 - begin) :] = loss["states"][:, max(0, begin - 1) : end - 1]
            net.backend.sparse_backward_block(
                net,
                net.backend.sparse_ring(net, before[begin : begin + longest]),
                self.x[begin:end],
                None if self.drive is None else self.drive[:, begin:end].contiguous(),
                state,
                words,
                loss["spikes"][begin:end],
                by_states,
                sweep,
                adjoints,
                None if net.inputs is None else grad_x[begin:end],
            )
        by_history = torch.full_like(self.history, torch.nan)
        net.backend.sparse_history_gradient(net, self.history, adjoints[:longest].contiguous(), by_history, sweep)
        assert sweep.sums is not None and sweep.recurrent is not None
        grads = {"state": sweep.lam, "history": by_history, "constants": sweep.sums, "recurrent": sweep.recurrent}
        return grads if sweep.inputs is None else grads | {"x": grad_x, "inputs": sweep.inputs}

    def random_loss(self) -> dict[str, Tensor]:
        """Weights of everything that a forward returns."""
        g = torch.Generator().manual_seed(9)
        dtype, (_, batch, neurons) = self.state.dtype, self.state.shape
        shapes = {"spikes": (len(self.x),), "states": (3, len(self.x)), "final": (3,)}
        return {
            name: torch.randn(*shape, batch, neurons, generator=g, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }


def _record(state: Tensor) -> Any:
    """The fields as the reference takes them."""
    return _Held(*state) if len(state) == 4 else State(*state)


class _Held:
    def __init__(self, v: Tensor, g_e: Tensor, g_i: Tensor, left: Tensor) -> None:
        self.v, self.g_e, self.g_i, self.left = v, g_e, g_i, left


def _fields(done: reference.Step) -> Tensor:
    return torch.stack([*done.state, *([] if done.left is None else [done.left])])


def _blocks(cuts: tuple[int, ...], steps: int) -> list[tuple[int, int]]:
    ends = [*cuts, steps]
    return list(zip([0, *cuts], ends, strict=True))


def sparse_network_problem(
    backend: Any,
    steps: int = 24,
    batch: int = 2,
    neurons: int = 75,
    *,
    dtype: torch.dtype = torch.float32,
    delays: tuple[int, int] = (2, 5),
    inputs: int = 0,
    dense: bool = True,
    refractory: bool = False,
    per_neuron: bool = False,
    jump_first: bool = False,
    graded: bool = False,
    seed: int = 0,
    device: torch.device = CPU,
    **options: Any,
) -> SparseProblem:
    """Neurons that fire often.

    Args:
        delays: the shortest and the longest in steps.
        inputs: number of channels with sparse synapses; 0 with ``dense``: a drive is given, without: there is none.
        graded: the spikes before the first step are numbers between -1 and 1.
        device: where the backend runs.
        options: of :func:`projection`.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    numbers: dict[str, Any] = dict(VALUES)
    if per_neuron:
        numbers["v_thresh"] = VALUES["v_thresh"] - 0.05 * uniform(batch, neurons)
    if refractory:
        numbers["refractory"] = 2.5 * DT if not per_neuron else DT * torch.ceil(3 * uniform(neurons))
    derived = derive_constants(CobaLIFParameters(**numbers, alpha=10.0), DT, dtype, CPU)
    rows = torch.broadcast_tensors(*derived, torch.zeros((batch, neurons) if per_neuron else ()))[:-1]
    constants = torch.stack([row.reshape(-1) for row in rows]).to(dtype).contiguous()
    recurrent = projection(neurons, neurons, g, dtype, steps=delays, **options)
    from_inputs = projection(inputs, neurons, g, dtype, **options) if inputs else None
    known = {
        "neurons": neurons,
        "inputs": from_inputs,
        "recurrent": recurrent,
        "per_ms": PER_MS,
        "shortest": delays[0],
        "longest": delays[1],
        "constants": constants,
        "jump_first": jump_first,
        "backend": backend,
    }
    net = SparseNetwork(*(known.get(name) for name in SparseNetwork._fields))
    x = (uniform(steps, batch, inputs) < 0.3).to(dtype)
    drive = None
    if not inputs and dense:
        drive = torch.round(uniform(2, steps, batch, neurons) * 64) / 1024 * torch.tensor([4, 1]).view(2, 1, 1, 1)
        drive = drive.to(dtype)
    state = torch.stack([-0.7 + uniform(batch, neurons) * 0.6, uniform(batch, neurons) * 0.1, uniform(batch, neurons) * 0.1])
    history = (uniform(delays[1], batch, neurons) < 0.2).to(dtype)
    if graded:
        history = history * (uniform(delays[1], batch, neurons) * 2 - 1)
    if refractory:
        left = torch.floor(uniform(batch, neurons) * 3)
        state = torch.cat([state, left.unsqueeze(0)])
    return SparseProblem(net, x, drive, state, history, device)
