"""Neurons as ``torch.nn.Module``: one step or a whole sequence, unconnected or recurrent.

They keep norse's conventions: time first, and ``forward(input_tensor, state=None)`` returns the output and the new
state, so that norse's ``Lift`` and ``SequentialState`` take them. What they compute is one call of a function of
:mod:`coba_triton.functional`, bit for bit.

The numbers of the parameter record ``p`` become attributes of their own names, all of them in the ``state_dict``:

- those named in ``learn`` are ``nn.Parameter``, float32 unless given as floating tensors; an ``nn.Parameter`` that is
  given is shared, not copied;
- all others are buffers. A Python number becomes a 0-dim float64 tensor, which ``.half()``, ``.to(dtype)`` and the like do
  not round. A tensor is converted with the weights, as in every module; a tensor of integers becomes a floating one.
  There are two exceptions: a refractory period of 0 and a ``conductance_based`` of 1 are plain attributes and not in the
  ``state_dict``, so that it is the same as without these two parameters.

Spikes have the dtype of a floating input. If the input is bool or integer, they have the dtype to which the module was
converted last, for example by ``.half()``, so that they fit the next layer.

By default they have the parameters :data:`coba_triton.default_learning_parameters`, in which conductances are multiples
of the leak conductance, and a step of 1 ms. Initial weights follow ``g_l`` and the number of inputs. Inputs of about 0.1
spikes a step then make a population of any size fire with about 0.1 spikes a step, and Adam's rate of 1e-3 is right.
(With more than about 1000 inputs, 3e-4 leaves fewer neurons silent.) The functions of :mod:`coba_triton.functional` keep
norse's defaults.

A module for sequences warns, once, if its neurons are silent although there is input, or if they fire in most steps. It
looks at its spikes in the first, second, fourth, eighth ... call, if they are on a CPU and cover 20 ms or more. It does
not look at those on a GPU, as that would wait for it.

``torch.fx`` traces them as calls of :mod:`coba_triton.functional`, one node each. ONNX takes them with
``backend="reference"``, for one length of the input, if their weights are dense and have no delays. Opacus refuses modules
that have buffers: it works with ``grad_sample_mode="no_op"`` and the gradients of every sample from
``torch.func.vmap(torch.func.grad(...))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .common.warned import warn
from .functional import (
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
)
from .neuron.records import (
    NUMERIC_PARAMETERS,
    CobaLIFParameters,
    FeedForwardState,
    RecurrentState,
    default_learning_parameters,
    numbers_of,
)
from .ops import validation
from .ops.given import limits
from .ops.kept import forget
from .ops.spikes import unpack_spikes
from .ops.synapses import Synapses, of_dense
from .ops.tensors import as_in_memory, is_watched, known
from .ops.validation import SpikeDtype
from .ops.wiring import check_delay

for _function in ("coba_lif_feed_forward_integral", "coba_lif_feed_forward_step", "coba_lif_integral", "coba_lif_step"):
    torch.fx.wrap(_function)


LOOKED_AT = 20.0  # ms; a shorter sequence says little of how often neurons fire
SATURATED = 0.5  # share of the steps


def _floating(value: Any) -> Any:
    """Tensors of integers, which norse's defaults are, as floating ones: they can be learned, and take any number."""
    return value if not isinstance(value, Tensor) or value.is_floating_point() else value.to(torch.get_default_dtype())


class _Neurons(nn.Module):
    """Holds the parameters of neurons and the time step."""

    def __init__(self, p: Any, dt: float, learn: Collection[str]) -> None:
        super().__init__()
        validation.check_parameters(p)
        self.dt = validation.check_dt(dt)
        validation.check_learn(learn, p)
        validation.warn_if_unstable(p, self.dt)
        self.dtype = torch.get_default_dtype()  # what the module was converted to last
        self.method: str = p.method
        self.learn = tuple(learn)
        given = {name: _floating(value) for name, value in numbers_of(p).items()}
        if not isinstance(given["refractory"], Tensor) and given["refractory"] == 0:
            self.refractory = given.pop("refractory")  # a buffer could be any number, and states would need another field
        if not isinstance(given["conductance_based"], Tensor) and given["conductance_based"] == 1:
            self.conductance_based = given.pop("conductance_based")  # so that a state_dict has what it had without it
        self._numbers = tuple(n for n, value in given.items() if n not in learn and not isinstance(value, Tensor))
        for name, value in given.items():
            if name in self._numbers:
                self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64))
            elif name not in learn:
                self.register_buffer(name, value.detach().clone())
            elif isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                start = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value)).float()
                self.register_parameter(name, nn.Parameter(start))
        validation.skip_stability(self.p, self.dt)

    @property
    def p(self) -> CobaLIFParameters:
        """The parameters as they are now."""
        return CobaLIFParameters(**{name: getattr(self, name) for name in NUMERIC_PARAMETERS}, method=self.method)

    def _parameters_for(self, x: Any = None, rank: int = 0) -> CobaLIFParameters:
        """The parameters, those that were given as Python numbers as such again where their values are at hand.

        An input of ``rank`` axes drives a single neuron without axes: there a 0-dim float64 tensor would promote the
        computation to float64, which a Python number does not.
        """
        single = not isinstance(x, torch.fx.Proxy) and getattr(x, "ndim", None) == rank
        p = self.p
        numbers: dict[str, Any] = {name: getattr(p, name) for name in self._numbers}
        return p._replace(**{name: value.item() if single else known(value) for name, value in numbers.items()})

    def _spikes_for(self, x: Any) -> torch.dtype | None:
        """The spikes' dtype where the input is of bool or integers and says nothing: what the layer behind has."""
        other = self.dtype != torch.float32 and isinstance(x, Tensor) and not x.is_floating_point()
        return self.dtype if other else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # what is not to be rounded
        numbers = [self._buffers.get(name) for name in (*self._numbers, "delay", "input_delays", "recurrent_delays")]

        def convert(tensor: Tensor) -> Tensor:
            if not any(tensor is number for number in numbers):
                return fn(tensor)
            try:
                moved = fn(tensor)
            except TypeError:  # the device has no float64
                return fn(tensor.float())
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        forget(self.parameters(recurse=False))
        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        default = default_learning_parameters
        shown = [f"dt={self.dt:g}"]
        for name in NUMERIC_PARAMETERS:
            value = torch.as_tensor(getattr(self, name))
            if value.dim() or value.is_meta:
                shown.append(f"{name}={list(value.shape)}")
            elif not math.isclose(number := value.item(), getattr(default, name), rel_tol=1e-6):
                shown.append(f"{name}={number:.6g}")
        if self.method != default.method:
            shown.append(f"method={self.method!r}")
        if self.learn:
            shown.append(f"learn={self.learn}")
        return ", ".join(shown)


class _RecurrentNeurons(_Neurons):
    """Holds the weights of a recurrent population as well."""

    input_weights: nn.Parameter
    recurrent_weights: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        p: Any,
        dt: float,
        autapses: bool,
        learn: Collection[str],
        given: tuple[Any, Any],
        delay: Any,
    ) -> None:
        super().__init__(p, dt, learn)
        self.input_size = input_size = validation.check_int(input_size, "input_size", 0)
        self.hidden_size = hidden_size = validation.check_int(hidden_size, "hidden_size")
        validation.check_flag(autapses, "autapses")
        self.autapses = autapses
        self._sparse: dict[str, tuple[float, float]] = {}
        for name, inputs, weights in zip(("input", "recurrent"), (input_size, hidden_size), given, strict=True):
            self._hold(name, weights, hidden_size, inputs)
        if delay is not None:
            if "recurrent" in self._sparse:
                raise ValueError(
                    "delay is for dense recurrent weights, got sparse ones, which have delays of their own; leave delay= "
                    "away"
                )
            self._span = check_delay(delay, hidden_size, self.dt)
            self.register_buffer("delay", as_in_memory(torch.as_tensor(delay, dtype=torch.float32)))
        else:
            self.delay = None
        with torch.no_grad():
            self._draw([name for name, weights in zip(("input", "recurrent"), given, strict=True) if weights is None])

    def _hold(self, name: str, weights: Any, neurons: int, inputs: int) -> None:
        """Weights as a parameter, and the rest of sparse synapses as buffers."""
        if weights is None:
            weights = torch.empty(neurons, inputs)
        if isinstance(weights, Tensor):
            validation.check_matrix(weights, f"{name}_weights")
            if weights.layout is not torch.strided:
                weights = Synapses.from_torch(weights)
        if not isinstance(weights, Tensor | Synapses):
            raise TypeError(
                f"{name}_weights must be a torch.Tensor or coba_triton.Synapses, got {type(weights).__name__}; use "
                "torch.as_tensor, or Synapses.from_coo"
            )
        shape = [weights.neurons, weights.sources] if isinstance(weights, Synapses) else list(weights.shape)
        if shape != [neurons, inputs]:
            raise ValueError(
                f"{name}_weights must be [{neurons}, {inputs}] for input_size={self.input_size} and "
                f"hidden_size={self.hidden_size}, got {shape}; transpose them, or pass the sizes that they have"
            )
        values: Any = weights
        if isinstance(weights, Synapses):
            self._sparse[name] = weights.shortest, weights.longest
            for part in ("indptr", "targets", "delays"):
                self.register_buffer(f"{name}_{part}", getattr(weights, part))
            validation.check_floating(weights.weights, f"{name}_weights.weights")
            values = weights.weights
        own = values if isinstance(values, nn.Parameter) else nn.Parameter(values.detach())
        self.register_parameter(f"{name}_weights", own)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        forget([*self.parameters(recurse=False), *self.buffers(recurse=False)])
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._sparse:
            delays = getattr(self, f"{name}_delays")
            if delays is not None and delays.numel() and delays.device.type != "meta":
                self._sparse[name] = limits(delays)
        if self.delay is not None and self.delay.device.type != "meta":
            self._span = limits(self.delay)

    def reset_parameters(self) -> None:
        """Draw the weights anew: normal around 0, with a standard deviation of ``sqrt(2 pi) g_l / fan_in``.

        Then one spike of every input opens, on average over the neurons, the leak conductance ``g_l`` in excitatory and
        as much in inhibitory synapses. Conductances do not cancel: those of both signs add up, in proportion to
        ``fan_in`` and not to its square root.

        Where all synapses are currents, ``g_l`` times the distance of ``v_thresh`` from ``v_rest`` stands for ``g_l``: the
        constant current that would bring a neuron to its threshold.
        """
        with torch.no_grad():
            self._draw(("input", "recurrent"))

    def _draw(self, names: Collection[str]) -> None:
        p = self.p
        leak = torch.as_tensor(p.g_l).float().mean()
        kind = p.conductance_based
        if isinstance(kind, Tensor) and not kind.is_meta and not kind.any():
            leak = leak * (torch.as_tensor(p.v_thresh) - p.v_rest).abs().float().mean()
        for name in names:
            weights = getattr(self, f"{name}_weights")
            fan_in = weights.shape[1] if name not in self._sparse else getattr(self, f"{name}_targets").shape[0]
            fan_in = fan_in if name not in self._sparse else fan_in / self.hidden_size
            weights.normal_().mul_(leak * math.sqrt(2 * math.pi) / max(fan_in, 1))
            if name == "recurrent" and not self.autapses and name not in self._sparse:
                weights.fill_diagonal_(0)

    def _synapses(self, name: str) -> Synapses:
        indptr, targets, weights, delays = (
            getattr(self, f"{name}_{part}") for part in ("indptr", "targets", "weights", "delays")
        )
        return Synapses(indptr, targets, weights, delays, self.hidden_size, *self._sparse[name])

    def _weights(self) -> tuple[Tensor | Synapses, Tensor | Synapses]:
        """Matrices or synapses; without autapses the diagonal of a recurrent matrix is 0 in use, and so is its gradient."""
        return (
            self._synapses("input") if "input" in self._sparse else self.input_weights,
            self._synapses("recurrent") if "recurrent" in self._sparse else self._recurrent_matrix(),
        )

    def _connections(self) -> dict[str, Any]:
        """Weights and delay as the functions take them.

        Where no number can be looked at, a matrix with a delay becomes synapses here, whose shortest and longest delay are
        known.
        """
        inputs, recurrent = self._weights()
        delay = self.delay
        if delay is not None and isinstance(recurrent, Tensor) and (is_watched() or recurrent.is_meta):
            recurrent, delay = of_dense(recurrent, delay, self._span), None
        return {"input_weights": inputs, "recurrent_weights": recurrent, "delay": delay}

    def _recurrent_matrix(self) -> Tensor:
        recurrent = self.recurrent_weights
        if self.autapses:
            return recurrent
        if validation.exports_to_onnx():  # which has no other form of it; this one takes longer
            diagonal = torch.eye(self.hidden_size, dtype=torch.bool, device=recurrent.device)
            return recurrent.masked_fill(diagonal, 0.0)
        return torch.diagonal_scatter(recurrent, recurrent.new_zeros(self.hidden_size))

    def extra_repr(self) -> str:
        autapses = ", autapses=True" if self.autapses else ""
        sparse = "".join(f", {name}={self._synapses(name)!r}" for name in self._sparse)
        return f"{self.input_size}, {self.hidden_size}, {super().extra_repr()}{autapses}{sparse}"


class _WholeSequence(nn.Module):
    """Holds the options of a run over a whole sequence, and looks at its spikes."""

    _defaults: ClassVar[dict[str, Any]] = dict(
        record_states=False, order="decay_first", backend="auto", block_steps=None, spike_dtype=None
    )
    p: CobaLIFParameters
    dt: float

    def _set_options(self, return_state: bool, **options: Any) -> None:
        validation.check_flag(return_state, "return_state")
        self.return_state = return_state
        self._calls = 0
        self._warned: set[str] = set()
        validation.check_order(options["order"])
        validation.check_flag(options["record_states"], "record_states")
        options["block_steps"] = validation.check_block_steps(options["block_steps"])
        validation.check_spike_dtype(options["spike_dtype"], options["block_steps"])
        for name, value in options.items():
            setattr(self, name, value)

        if options["record_states"] and not return_state:
            raise ValueError("return_state must be True to return recorded states, got False; leave out record_states")

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults}

    def _output(self, input_tensor: Any, result: Any) -> Any:
        """What ``forward`` returns, of the spikes and the state."""
        self._look_at(input_tensor, result[0])
        return result if self.return_state else result[0]

    def _look_at(self, x: Any, spikes: Any) -> None:
        """Warn of a population that is silent or saturated. The module's text says when this looks."""
        if is_watched() or validation.exports_to_onnx() or type(spikes) is not Tensor or spikes.device.type != "cpu":
            return
        self._calls += 1
        if self._calls & (self._calls - 1) or len(x) * self.dt < LOOKED_AT or not spikes.numel():
            return
        with torch.no_grad():
            spikes = unpack_spikes(spikes, len(x)) if self.spike_dtype == "bits" else spikes
            share = spikes.count_nonzero().item() / spikes.numel()
            p, steps = self.p, f"{len(x)} steps of {self.dt:g} ms"
            leak = torch.as_tensor(p.g_l).double().mean().item()
            membrane = (1 / (torch.as_tensor(p.c_m_inv).double() * torch.as_tensor(p.g_l).double())).mean().item()
            if share == 0 and "silent" not in self._warned and bool(x.any()):
                self._warned.add("silent")
                warn(
                    f"no neuron of {type(self).__name__} fired in {steps}, although there was input: what follows gets "
                    "nothing, and hardly any gradient comes back. Make the input or the weights larger, or v_thresh lower. "
                    f"An input that opens half of the leak conductance, g_l = {leak:g}, is a strong one"
                )
            elif share > SATURATED and "saturated" not in self._warned:
                self._warned.add("saturated")
                warn(
                    f"the neurons of {type(self).__name__} fired in {share:.0%} of {steps}: they tell little of their "
                    f"input. Make the input or the weights smaller, or dt shorter. The leak conductance, g_l, is "
                    f"{leak:g}, and the time constant of the membrane is {membrane:g} ms"
                )

    def extra_repr(self) -> str:
        options = self._options() | {"return_state": self.return_state}
        defaults = self._defaults | {"return_state": True}
        shown = [f"{name}={value!r}" for name, value in options.items() if value != defaults[name]]
        return ", ".join([super().extra_repr(), *shown])


class CobaLIFFeedForwardCell(_Neurons):
    """One step of unconnected conductance-based LIF neurons: :func:`coba_triton.coba_lif_feed_forward_step`.

    Args:
        p: parameters, see :class:`CobaLIFParameters`; they become attributes of the module. By default
            :data:`coba_triton.default_learning_parameters`.
        dt: time step in ms. It has to be several times shorter than the time constants in ``p``.
        learn: names of the numbers in ``p`` that are learned: any but ``alpha``, ``refractory`` and ``conductance_based``.

    Shape:
        ``input_tensor [*shape]`` in the unit of ``g_l`` and the state, or None to start at rest, to spikes ``[*shape]``
        and the new state.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``learn`` names what cannot be learned, or an argument's value is out of range.

    Example:
        >>> cell = CobaLIFFeedForwardCell(learn=("v_thresh",))
        >>> spikes, state = cell(torch.ones(3))
        >>> spikes, state = cell(torch.ones(3), state)
        >>> cell.v_thresh
        Parameter containing:
        tensor(-50., requires_grad=True)
    """

    def __init__(
        self,
        p: Any = default_learning_parameters,
        dt: float = 1.0,
        *,
        learn: Collection[str] = (),
    ) -> None:
        super().__init__(p, dt, learn)

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, FeedForwardState]:
        z, state = coba_lif_feed_forward_step(input_tensor, state, self._parameters_for(input_tensor, 0), self.dt)
        return z.to(self._spikes_for(input_tensor) or z.dtype), state


class CobaLIFCell(_RecurrentNeurons):
    """One step of a recurrent population of conductance-based LIF neurons: :func:`coba_triton.coba_lif_step`.

    Args:
        input_size: number of inputs I, 0 for a population that drives itself: its input is ``[*batch, 0]``.
        hidden_size: number of neurons N.
        p: parameters, see :class:`CobaLIFParameters`; they become attributes of the module. By default
            :data:`coba_triton.default_learning_parameters`.
        dt: time step in ms. It has to be several times shorter than the time constants in ``p``.
        autapses: let neurons connect to themselves. Otherwise the diagonal of ``recurrent_weights`` starts at 0, gets
            no gradient, and is taken as 0 whatever is written to it. Sparse synapses are taken as they are.
        learn: names of the numbers in ``p`` that are learned: any but ``alpha``, ``refractory`` and ``conductance_based``.
        input_weights: instead of drawn ones, a matrix ``[N, I]``, or :class:`coba_triton.Synapses` or a matrix of a sparse
            layout, of which the weights become a parameter and the rest buffers.
        recurrent_weights: likewise, ``[N, N]``.
        delay: of the synapses of a recurrent matrix in ms, one number or one for each source; None: one step. Sparse
            synapses have delays of their own.

    Attributes:
        input_weights: in the unit of ``g_l``, ``[N, I]``; a positive weight is an excitatory synapse, a negative one
            inhibitory. Drawn by :meth:`reset_parameters`.
        recurrent_weights: in the same unit, ``[N, N]``, rows post-synaptic; drawn likewise.

    Shape:
        ``input_tensor [*batch, I]`` and the state, or None to start at rest, to spikes ``[*batch, N]`` and the new
        state.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``learn`` names what cannot be learned, or an argument's value is out of range.

    Example:
        >>> cell = CobaLIFCell(3, 2)
        >>> spikes, state = cell(torch.ones(8, 3))
        >>> spikes, state = cell(torch.ones(8, 3), state)
        >>> spikes.shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        p: Any = default_learning_parameters,
        dt: float = 1.0,
        *,
        autapses: bool = False,
        learn: Collection[str] = (),
        input_weights: Any = None,
        recurrent_weights: Any = None,
        delay: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, p, dt, autapses, learn, (input_weights, recurrent_weights), delay)

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, RecurrentState]:
        return coba_lif_step(input_tensor, state, p=self._parameters_for(), dt=self.dt, **self._connections())


class CobaLIF(_WholeSequence, _Neurons):
    """Unconnected conductance-based LIF neurons over a whole sequence.

    See :func:`coba_triton.coba_lif_feed_forward_integral`, which it calls.

    Args:
        p: parameters, see :class:`CobaLIFParameters`; they become attributes of the module. By default
            :data:`coba_triton.default_learning_parameters`.
        dt: time step in ms. It has to be several times shorter than the time constants in ``p``.
        record_states: return the state of every step, ``[T, *shape]`` a field, instead of the final one.
        learn: names of the numbers in ``p`` that are learned: any but ``alpha``, ``refractory`` and ``conductance_based``.
        return_state: False to return the spikes alone, as ``torch.nn.Sequential`` needs it between two layers.
        order: ``decay_first``, or ``jump_first`` as norse's feed-forward step has it.
        backend: which implementation computes; all give the same bits.
        block_steps: steps in one launch; None for all of them.
        spike_dtype: dtype of the spikes, ``"bits"`` to pack them, or None. With None, spikes have the dtype of a floating
            input. If the input is bool or integer, they have the dtype of the module (``.half()``).
        time_chunks: as in :func:`coba_triton.coba_lif_feed_forward_integral`; changes no result.

    Shape:
        ``input_tensor [T, *shape]`` in the unit of ``g_l`` and the state, or None to start at rest, to spikes
        ``[T, *shape]`` and the state, or to the spikes alone.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``learn`` names what cannot be learned, or an argument's value is unknown or out of range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), CobaLIF(record_states=True))
        >>> spikes, states = model(torch.ones(100, 8, 3))
        >>> spikes.shape, states.v.shape
        (torch.Size([100, 8, 4]), torch.Size([100, 8, 4]))
        >>> neurons = CobaLIF(return_state=False)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), neurons, torch.nn.Linear(4, 2))
        >>> model(torch.ones(100, 8, 3)).shape
        torch.Size([100, 8, 2])
    """

    _defaults: ClassVar[dict[str, Any]] = _WholeSequence._defaults | dict(time_chunks=None)

    def __init__(
        self,
        p: Any = default_learning_parameters,
        dt: float = 1.0,
        record_states: bool = False,
        *,
        learn: Collection[str] = (),
        return_state: bool = True,
        order: str = "decay_first",
        backend: str = "auto",
        block_steps: int | None = None,
        spike_dtype: SpikeDtype = None,
        time_chunks: int | None = None,
    ) -> None:
        super().__init__(p, dt, learn)
        self._set_options(
            return_state,
            record_states=record_states,
            order=order,
            backend=backend,
            block_steps=block_steps,
            spike_dtype=spike_dtype,
            time_chunks=validation.check_time_chunks(time_chunks),
        )

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        p = self._parameters_for(input_tensor, 1)
        options = self._options()
        options["spike_dtype"] = options["spike_dtype"] or self._spikes_for(input_tensor)
        return self._output(input_tensor, coba_lif_feed_forward_integral(input_tensor, state, p, self.dt, **options))


class CobaLIFRecurrent(_WholeSequence, _RecurrentNeurons):
    """A recurrent population of conductance-based LIF neurons over a whole sequence.

    See :func:`coba_triton.coba_lif_integral`, which it calls.

    Args:
        input_size: number of inputs I, 0 for a population that drives itself: its input is ``[T, *batch, 0]``.
        hidden_size: number of neurons N.
        p: parameters, see :class:`CobaLIFParameters`; they become attributes of the module. By default
            :data:`coba_triton.default_learning_parameters`.
        dt: time step in ms. It has to be several times shorter than the time constants in ``p``.
        record_states: return the state of every step, ``[T, *batch, N]`` a field, instead of the final one.
        autapses: let neurons connect to themselves. Otherwise the diagonal of ``recurrent_weights`` starts at 0, gets
            no gradient, and is taken as 0 whatever is written to it. Sparse synapses are taken as they are.
        learn: names of the numbers in ``p`` that are learned: any but ``alpha``, ``refractory`` and ``conductance_based``.
        input_weights: instead of drawn ones, a matrix ``[N, I]``, or :class:`coba_triton.Synapses` or a matrix of a sparse
            layout, of which the weights become a parameter and the rest buffers.
        recurrent_weights: likewise, ``[N, N]``.
        delay: of the synapses of a recurrent matrix in ms, one number or one for each source; None: one step. Sparse
            synapses have delays of their own.
        return_state: False to return the spikes alone, as ``torch.nn.Sequential`` needs it between two layers.
        order: ``decay_first`` or ``jump_first``.
        backend: which implementation computes.
        block_steps: steps in one launch; None for a choice, as in :func:`coba_triton.coba_lif_integral`. Changes no
            result of the forward.
        spike_dtype: dtype of the spikes, ``"bits"`` to pack them, or None. With None, spikes have the dtype of a floating
            input. If the input is bool or integer, they have the dtype of the module (``.half()``).

    Attributes:
        input_weights: in the unit of ``g_l``, ``[N, I]``; a positive weight is an excitatory synapse, a negative one
            inhibitory. Drawn by :meth:`reset_parameters`.
        recurrent_weights: in the same unit, ``[N, N]``, rows post-synaptic; drawn likewise.

    Shape:
        ``input_tensor [T, *batch, I]`` and the state, or None to start at rest, to spikes ``[T, *batch, N]`` and the
        state, or to the spikes alone.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``learn`` names what cannot be learned, or an argument's value is unknown or out of range.

    Example:
        >>> network = CobaLIFRecurrent(3, 2)
        >>> x = (torch.rand(150, 8, 3) < 0.1).float()  # 0.1 spikes a step
        >>> first, state = network(x[:100])
        >>> more, state = network(x[100:], state)
        >>> more.shape
        torch.Size([50, 8, 2])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        p: Any = default_learning_parameters,
        dt: float = 1.0,
        record_states: bool = False,
        *,
        autapses: bool = False,
        learn: Collection[str] = (),
        return_state: bool = True,
        order: str = "decay_first",
        backend: str = "auto",
        block_steps: int | None = None,
        spike_dtype: SpikeDtype = None,
        input_weights: Any = None,
        recurrent_weights: Any = None,
        delay: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, p, dt, autapses, learn, (input_weights, recurrent_weights), delay)
        self._set_options(
            return_state,
            record_states=record_states,
            order=order,
            backend=backend,
            block_steps=block_steps,
            spike_dtype=spike_dtype,
        )

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        options = self._options() | self._connections()
        p = self._parameters_for()
        return self._output(input_tensor, coba_lif_integral(input_tensor, state, p=p, dt=self.dt, **options))
