"""Sparse synapses from ``K`` sources onto ``N`` neurons, sorted once by source: the record and what makes it."""

from __future__ import annotations

import json
import math
import numbers
import os
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.files import local_path, reason, written_whole
from .given import (
    MOST,
    check_range,
    check_shape,
    delays_of,
    device_of,
    example,
    indices,
    limits,
    to_tensor,
    values_of,
)
from .random_synapses import Law, Wanted, draw
from .tensors import FLOATING, as_in_memory, is_tracked, is_watched
from .validation import check_dt, check_flag, check_floating, check_int, check_not_nested, is_one_of

FORMAT = "coba_triton.Synapses 1"
COUNTED_FROM = 2**14  # synapses that the CPU kernels sort: fewer are not worth it to load them
PIECE_BYTES = 2**24  # bytes that are read from a file at a time
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc)


class Synapses(NamedTuple):
    """Sparse synapses of ``K`` sources onto ``N`` neurons, by source. A pair may have several synapses.

    The constructors :meth:`from_coo`, :meth:`from_torch` and :meth:`from_scipy` check and sort what they get. Gradients
    flow back from the field ``weights`` to the tensor that was given. If that tensor is sorted already, it becomes the field
    itself, and stays a leaf of autograd. :meth:`fixed_probability` and :meth:`fixed_number` draw random synapses.

    Weights have the unit of ``g_l``: uS, or multiples of the leak (``docs/model.md`` has both).

    A synapse needs 4 bytes for its target, and the bytes of a weight and of a delay where it has its own.

    Attributes:
        indptr: the synapses of source ``k`` are ``indptr[k]`` to ``indptr[k + 1]``; int64 ``[K + 1]``.
        targets: the post-synaptic neuron of every synapse, int32 ``[S]``, ascending within a source.
        weights: in uS, floating: one for each synapse ``[S]``, for each source ``[K, 1]`` or for all ``[1]``. A positive
            one is excitatory, a negative one inhibitory.
        delays: in ms, float32, of such a shape; they have no gradient. None: one time step, whatever its length is.
        neurons: N, the number of post-synaptic neurons.
        shortest: the least delay in ms, 0.0 where ``delays`` is None.
        longest: the greatest delay in ms, 0.0 where ``delays`` is None.

    Example:
        >>> synapses = Synapses.from_coo([1, 0], [0, 2], [0.01, -0.02], delays=0.5, shape=(2, 3))
        >>> synapses.indptr.tolist(), synapses.targets.tolist()
        ([0, 1, 1, 2], [1, 0])
        >>> synapses
        Synapses(3 sources -> 2 neurons, 2 synapses, weights -0.02 to 0.01, delays 0.5 ms, 10 bytes a synapse)
    """

    indptr: Tensor
    targets: Tensor
    weights: Tensor
    delays: Tensor | None
    neurons: int
    shortest: float
    longest: float

    @property
    def sources(self) -> int:
        """K, the number of sources."""
        return self.indptr.shape[0] - 1

    @property
    def count(self) -> int:  # type: ignore[override]  # of synapses, not of equal fields
        """S, the number of synapses."""
        return self.targets.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self if isinstance(value, Tensor))

    def __repr__(self) -> str:
        count = self.count
        each = (self.nbytes - self.indptr.nbytes) / count if count else 0
        return (
            f"Synapses({self.sources:,} sources -> {self.neurons:,} neurons, {count:,} synapses, "
            f"weights {_describe(self.weights)}, "
            f"delays {'of one step' if self.delays is None else _span(self.shortest, self.longest) + ' ms'}, "
            f"{each:.3g} bytes a synapse)"
        )

    def to(self, *args: Any, **kwargs: Any) -> Synapses:
        """The same on another device, or with weights of another dtype; the arguments are those of :meth:`torch.Tensor.to`.

        Raises:
            TypeError: if the dtype is not a floating one.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"weights must be of a floating dtype of 16 bits or more, got {dtype}; use torch.float32")

        def move(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=non_blocking)

        delays = None if self.delays is None else move(self.delays)
        return self._replace(
            indptr=move(self.indptr), targets=move(self.targets), weights=move(self.weights, dtype), delays=delays
        )

    def with_weights(self, weights: Tensor) -> Synapses:
        """The same synapses with other weights, in the order of :attr:`targets`. Their numbers are not looked at.

        Args:
            weights: in uS, ``[S]``, ``[K, 1]`` or ``[1]``, on the device of the synapses.

        Raises:
            TypeError: if they are no tensor of a floating dtype.
            ValueError: if they are of another shape or on another device.
        """
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a torch.Tensor, got {type(weights).__name__}; use torch.as_tensor")
        if weights.device != self.targets.device:
            raise ValueError(
                f"weights must be on the synapses' device {str(self.targets.device)!r}, got {str(weights.device)!r}; move "
                f"them with .to({str(self.targets.device)!r})"
            )
        return self._replace(weights=values_of(weights, "weights", self.count, self.sources, weights.device))

    def source_of(self) -> Tensor:
        """The source of every synapse, int64 ``[S]``."""
        each = torch.arange(self.sources, device=self.indptr.device)
        return torch.repeat_interleave(each, self.indptr.diff(), output_size=self.count)

    def to_dense(self) -> Tensor:
        """The weights as a matrix ``[N, K]`` in uS; several synapses of a pair are added up. For small networks."""
        sources = self.source_of()
        places = self.targets.long() * self.sources + sources
        dense = self.weights.new_zeros(self.neurons * self.sources)
        return dense.index_add(0, places, each_of(self.weights, sources)).view(self.neurons, self.sources)

    def check_delays(self, dt: float) -> tuple[int, int]:
        """The shortest and the longest delay in steps of ``dt`` ms: the nearest whole number, in float32.

        Raises:
            ValueError: if the shortest one is below one step.
        """
        if self.delays is None or not self.count:
            return 1, 1
        return steps_of(self.shortest, self.longest, dt)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the synapses to an ``.npz`` file, whole or not at all. A file of this name is replaced.

        Raises:
            OSError: if the file cannot be written.
        """
        place = local_path(path, "path")
        about = {
            "format": FORMAT,
            "dtype": str(self.weights.dtype).removeprefix("torch."),
            "neurons": self.neurons,
            "has_delays": self.delays is not None,
        }
        kept = in_memory(self)
        weights = kept.weights.detach().cpu()
        arrays = {
            "about": np.array(json.dumps(about)),
            "indptr": kept.indptr.cpu().numpy(),
            "targets": kept.targets.cpu().numpy(),
            "weights": (weights.view(torch.int16) if weights.dtype == torch.bfloat16 else weights).numpy(),
        }
        if kept.delays is not None:
            arrays["delays"] = kept.delays.cpu().numpy()
        try:
            with written_whole(place) as part, part.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise type(error)(f"the synapses cannot be written to {place} ({reason(error)}); choose another path") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Synapses:
        """What :meth:`save` wrote, on the CPU; the weights do not require grad.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it holds no synapses, or is damaged.
        """
        place = local_path(path, "path")
        if not place.exists():
            raise FileNotFoundError(f"there is no file {place}; give the path that save() wrote to")
        damaged = (ValueError, KeyError, TypeError, EOFError, RecursionError, NotImplementedError, RuntimeError)
        try:
            if not place.is_file():
                raise ValueError("it is no regular file")
            with zipfile.ZipFile(place) as file:
                members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
                about = json.loads(str(_read_member(file, members["about"])))
                if about["format"] != FORMAT:
                    raise ValueError(f"its format is {about['format']!r:.50}")
                names = ("indptr", "targets", "weights", *(["delays"] if about["has_delays"] else []))
                found = {name: torch.from_numpy(_read_member(file, members[name])) for name in names}
            return cls._of_file(about, **found)
        except (*damaged, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{place} holds no synapses, or is damaged ({error}); give a file that save() wrote") from None

    @classmethod
    def _of_file(
        cls, about: Any, indptr: Tensor, targets: Tensor, weights: Tensor, delays: Tensor | None = None
    ) -> Synapses:
        """The record of arrays that may be anything."""
        neurons = check_int(about["neurons"], "neurons", 0, MOST)
        if about["dtype"] == "bfloat16" and weights.dtype == torch.int16:
            weights = weights.view(torch.bfloat16)
        if (indptr.dtype, targets.dtype, str(weights.dtype)) != (torch.int64, torch.int32, f"torch.{about['dtype']}"):
            raise ValueError("its arrays are of other dtypes")
        if indptr.dim() != 1 or targets.dim() != 1 or not len(indptr):
            raise ValueError("its arrays are of other shapes")
        if indptr[0] != 0 or indptr[-1] != len(targets) or (indptr.diff() < 0).any():
            raise ValueError("its sources do not divide its synapses")
        starts = torch.zeros(len(targets) + 1, dtype=torch.bool)
        starts[indptr] = True
        if ((targets[1:] < targets[:-1]) & ~starts[1 : len(targets)]).any():
            raise ValueError("its targets are not sorted")
        check_range(targets, "targets", "N", neurons)
        given = values_of(weights, "weights", len(targets), len(indptr) - 1, weights.device)
        return record_of(indptr, targets, given, delays, neurons)

    @classmethod
    def join(cls, parts: Iterable[Synapses]) -> Synapses:
        """All synapses of several records in one. Of one pair, those of an earlier record come first.

        The result has one weight (or delay) for all synapses, or one for each source, where that gives every synapse the
        number that it has in its record. Weights that require a gradient are not made one because they are equal: training
        may make them differ.

        Args:
            parts: at least one record; of the same sources, neurons, device and dtype.

        Raises:
            TypeError: if it is no list, or one of them is no record of synapses.
            ValueError: if they do not belong together.
        """
        if isinstance(parts, cls) or not isinstance(parts, Iterable):
            got = "a single record" if isinstance(parts, cls) else type(parts).__name__
            raise TypeError(f"parts must be a list of records of synapses, got {got}; put all records in one list")
        parts = list(parts)
        if not parts:
            raise ValueError(
                "parts must be at least one record of synapses, got none; pass Synapses.from_coo([], [], 0.0, ...)"
            )
        for part in parts:
            if not isinstance(part, cls):
                raise TypeError(f"parts must be records of synapses, got {type(part).__name__}; build them with Synapses")
        kinds = [
            (p.neurons, p.sources, str(p.targets.device), p.weights.dtype, "none" if p.delays is None else "in ms")
            for p in parts
        ]
        for what, *values in zip(("neurons", "sources", "device", "dtype", "delays"), *kinds, strict=True):
            if len(set(values)) > 1:
                got = " and ".join(map(str, dict.fromkeys(values)))
                raise ValueError(f"parts must have the same {what}, got {got}; build them alike")
        if len(parts) == 1:
            return parts[0]
        neurons = parts[0].neurons
        sources = [part.source_of() for part in parts]
        targets = torch.cat([part.targets for part in parts])
        indptr, targets, order = _sort(targets, torch.cat(sources), neurons, parts[0].sources)
        fans = [part.indptr.diff() > 0 for part in parts]
        weights = _merge([part.weights for part in parts], fans, sources, order, indptr)
        delays = None
        if parts[0].delays is not None:
            delays = _merge([part.delays for part in parts if part.delays is not None], fans, sources, order, indptr)
        return record_of(indptr, targets, weights, delays, neurons)

    @classmethod
    def from_coo(cls, targets: Any, sources: Any, weights: Any, delays: Any = None, *, shape: tuple[int, int]) -> Synapses:
        """Synapses from lists of pairs.

        Args:
            targets: the post-synaptic neuron of every synapse, from 0 to N - 1, ``[S]``: the rows of a matrix.
            sources: the source of every synapse, from 0 to K - 1, ``[S]``: its columns.
            weights: in uS, a number, or one for each synapse ``[S]`` or source ``[K, 1]``. Numbers of Python get PyTorch's
                default dtype; arrays and tensors keep theirs.
            delays: in ms, likewise. None: one time step, whatever its length is.
            shape: ``(N, K)``, as that of a matrix with the weights.

        Raises:
            TypeError: if indices are no integers, or weights or delays no real numbers.
            ValueError: if lengths or devices differ, an index is out of range, a weight or delay is not finite, a delay is
                negative, or the magnitudes of a neuron's weights have no finite sum.

        Example:
            >>> Synapses.from_coo(targets=[2, 0], sources=[0, 1], weights=0.004, shape=(3, 2)).to_dense().tolist()[2]
            [0.004000000189989805, 0.0]
        """
        neurons, count_sources = check_shape(shape)
        named = {"targets": targets, "sources": sources, "weights": weights, "delays": delays}
        device = device_of(named)
        rows, columns = (indices(named[name], name, device) for name in ("targets", "sources"))
        if len(rows) != len(columns):
            raise ValueError(f"targets and sources must be of one length, got {len(rows)} and {len(columns)}; give pairs")
        check_range(rows, "targets", "N", neurons)
        check_range(columns, "sources", "K", count_sources)
        given = values_of(weights, "weights", len(rows), count_sources, device)
        taken = None if delays is None else values_of(delays, "delays", len(rows), count_sources, device)
        indptr, ordered, order = _sort(rows, columns, neurons, count_sources)
        return record_of(indptr, ordered, _permute(given, order), _permute(taken, order), neurons)

    @classmethod
    def from_torch(cls, matrix: Tensor, delays: Any = None) -> Synapses:
        """Synapses from a matrix of weights.

        Every value that a sparse matrix stores is a synapse, also 0, and several ones of a place are several synapses. A
        sparse leaf that requires grad gets a sparse gradient of the same layout, with the same places. Of a dense matrix,
        every entry is a synapse.

        Args:
            matrix: in uS, ``[N, K]``, rows post-synaptic: dense, or a sparse one of the layout COO, CSR or CSC.
            delays: in ms, a number or, of a sparse matrix, one for each stored value, in the order of the matrix; of a
                dense one, one for each source ``[K]`` or entry ``[N, K]``. None: one time step, whatever its length is.

        Raises:
            TypeError: if it is no such matrix.
            ValueError: as :meth:`from_coo` does.

        Example:
            >>> Synapses.from_torch(torch.tensor([[0.0, 0.5], [0.25, 0.0]]).to_sparse()).weights.tolist()
            [0.25, 0.5]
        """
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix must be a torch.Tensor, got {type(matrix).__name__}; use from_scipy or torch.as_tensor")
        check_not_nested(matrix, "matrix")
        if matrix.layout not in (torch.strided, torch.sparse_coo, *_COMPRESSED):
            raise TypeError(
                f"matrix must be dense, or sparse with the layout COO, CSR or CSC, got {matrix.layout}; use .to_sparse_coo()"
            )
        check_floating(matrix, "matrix")
        if matrix.dim() != 2 or (matrix.layout is not torch.strided and matrix.dense_dim()):
            raise ValueError(f"matrix must be [N, K], rows post-synaptic, got shape {list(matrix.shape)}; reshape it")
        neurons, sources = check_shape(matrix.shape)
        device = device_of({"matrix": matrix, "delays": delays})
        if matrix.layout is torch.strided:
            if not (is_watched() or matrix.is_meta) or not (delays is None or isinstance(delays, int | float)):
                return of_dense(matrix, delays)
            number = _single(float(delays or 0.0))
            return of_dense(matrix, None if delays is None else torch.full((1,), number, device=device), (number, number))
        with torch.no_grad():
            stored, rows, columns = _stored(matrix)
            taken = None if delays is None else values_of(delays, "delays", len(stored), sources, device)
            indptr, targets, order = _sort(rows, columns, neurons, sources)
        weights: Any = _Stored.apply(matrix, order) if is_tracked(matrix) else _permute(stored, order)  # type: ignore[no-untyped-call]
        return record_of(indptr, targets, weights, _permute(taken, order), neurons)

    @classmethod
    def fixed_probability(
        cls,
        sources: int,
        neurons: int,
        probability: float,
        weight: float | Tensor | Law,
        delay: float | Tensor | Law | None = None,
        *,
        seed: int,
        autapses: bool = True,
        only: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Synapses:
        """Random synapses: each pair of a source and a neuron has one with the same probability.

        The synapses onto a neuron, their weights and their delays follow from the arguments and the number of the neuron
        alone, on every machine: processes that make the synapses of some neurons each make the same network together. The
        time is proportional to the synapses that are made. Projections of one network need different seeds: with the same
        one, neurons of the same number get the same sources.

        Args:
            sources: K.
            neurons: N.
            probability: from 0 to 1.
            weight: in uS: a number, a distribution to draw the weight of each synapse from (:class:`Uniform`,
                :class:`Normal`, :class:`LogNormal`), or a tensor with one for each source ``[K, 1]`` or for all ``[1]``.
            delay: in ms, likewise. None: one time step, whatever its length is.
            seed: from 0 to 2**64 - 1.
            autapses: whether neuron ``n`` may have a synapse from source ``n``.
            only: ``(begin, end)`` makes the synapses onto the neurons ``begin`` to ``end - 1`` alone; they keep their
                numbers.
            dtype: of weights that are numbers or drawn, None for PyTorch's default.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if a value is out of range, or as :meth:`from_coo` does.

        Example:
            >>> Synapses.fixed_probability(4000, 4000, 0.02, 0.004, 0.3, seed=1, autapses=False)
            Synapses(4,000 sources -> 4,000 neurons, 319,236 synapses, weights 0.004, delays 0.3 ms, 4 bytes a synapse)
        """
        if isinstance(probability, bool) or not isinstance(probability, numbers.Real):
            raise TypeError(
                f"probability must be a number from 0 to 1, got {type(probability).__name__}; pass a Python float"
            )
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be a number from 0 to 1, got {probability!r:.50}; divide percents by 100")
        wanted = Wanted(sources, neurons, weight, delay, seed, autapses, only, dtype).checked()
        return record_of(*draw(wanted, float(probability), -1, False, True), wanted.neurons)

    @classmethod
    def fixed_number(
        cls,
        sources: int,
        neurons: int,
        number: int,
        weight: float | Tensor | Law,
        delay: float | Tensor | Law | None = None,
        *,
        seed: int,
        per: Literal["target", "source"] = "target",
        replace: bool = False,
        autapses: bool = True,
        only: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Synapses:
        """Random synapses: each neuron has the same number of them, or each source has.

        What :meth:`fixed_probability` says of seeds and processes holds here as well. With ``per="source"``, a process
        draws the targets of all synapses, and keeps those that it makes.

        Args:
            sources: K.
            neurons: N.
            number: of synapses of each neuron or source.
            weight: as in :meth:`fixed_probability`.
            delay: as in :meth:`fixed_probability`.
            seed: from 0 to 2**64 - 1.
            per: ``"target"`` or ``"source"``: what has this number of synapses.
            replace: whether a pair may have several synapses.
            autapses: as in :meth:`fixed_probability`.
            only: as in :meth:`fixed_probability`.
            dtype: as in :meth:`fixed_probability`.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if a value is out of range, or as :meth:`from_coo` does.

        Example:
            >>> Synapses.fixed_number(1000, 10, 80, Normal(0.006, 0.002, low=0.0), Uniform(0.2, 2.0), seed=1).count
            800
        """
        number = check_int(number, "number", 0, MOST)
        if not is_one_of(per, ("target", "source")):
            raise ValueError(f"per must be 'target' or 'source', got {per!r:.200}")
        check_flag(replace, "replace")
        wanted = Wanted(sources, neurons, weight, delay, seed, autapses, only, dtype).checked()
        most = (wanted.sources if per == "target" else wanted.neurons) - (not wanted.autapses)
        if number > (most if not replace else MOST if most > 0 else 0):
            what = "sources" if per == "target" else "neurons"
            raise ValueError(
                f"number must be at most {max(most, 0)}, the {what} to choose from, got {number}"
                + ("; pass replace=True for several synapses of a pair" if most > 0 else "; pass more of them")
            )
        return record_of(*draw(wanted, 0.0, number, replace, per == "target"), wanted.neurons)

    @classmethod
    def from_scipy(cls, matrix: Any, delays: Any = None) -> Synapses:
        """Synapses from a sparse matrix or array of SciPy; every stored value is one.

        Args:
            matrix: in uS, ``[N, K]``, rows post-synaptic, of any format and of a floating dtype, which the weights keep.
            delays: in ms, a number or one for each stored value, in the order of ``matrix.tocoo()``. None: one time step,
                whatever its length is.

        Raises:
            TypeError: if it is no such matrix.
            ValueError: as :meth:`from_coo` does.

        Example:
            >>> import scipy.sparse
            >>> Synapses.from_scipy(scipy.sparse.csr_array([[0.0, 0.5], [0.25, 0.0]]), delays=1.5).targets.tolist()
            [1, 0]
        """
        if not hasattr(matrix, "tocoo"):
            raise TypeError(
                f"matrix must be a sparse matrix of SciPy, got {type(matrix).__name__}; use from_torch(torch.as_tensor(...))"
            )
        if len(matrix.shape) != 2:
            raise ValueError(f"matrix must be [N, K], rows post-synaptic, got shape {list(matrix.shape)}; reshape it")
        entries = matrix.tocoo()
        if entries.data.dtype.kind != "f":
            raise TypeError(f"matrix must be of a floating dtype, got {entries.data.dtype}; use .astype(numpy.float32)")
        return cls.from_coo(
            entries.row, entries.col, entries.data, delays, shape=(int(entries.shape[0]), int(entries.shape[1]))
        )


class _Stored(torch.autograd.Function):
    """The stored values of a sparse matrix in another order; the gradient is a matrix with the same places.

    It has the layout of the matrix, but for CSC, of which PyTorch accumulates no gradients: it has COO.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, order: Tensor | None) -> Tensor:
        if matrix.layout is torch.sparse_csr:
            values, *places = matrix.values(), matrix.crow_indices(), matrix.col_indices()
            ctx.coalesced = None
        else:
            values, *pairs = _stored(matrix)
            places = [torch.stack(pairs)]
            ctx.coalesced = matrix.layout is torch.sparse_coo and matrix.is_coalesced()
        ctx.save_for_backward(order, *places)
        ctx.shape = matrix.shape
        return values.clone() if order is None else values[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        order, *places = ctx.saved_tensors
        values = grad if order is None else torch.zeros_like(grad).index_copy(0, order, grad)
        if ctx.coalesced is None:
            return torch.sparse_csr_tensor(places[0], places[1], values, ctx.shape, check_invariants=False), None
        matrix = torch.sparse_coo_tensor(places[0], values, ctx.shape, is_coalesced=ctx.coalesced, check_invariants=False)
        return matrix, None


def _stored(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values, rows and columns that a sparse matrix stores, in its own order."""
    if matrix.layout is torch.sparse_coo:
        rows, columns = matrix._indices()
        return matrix._values(), rows, columns
    by_row = matrix.layout is torch.sparse_csr
    starts = matrix.crow_indices() if by_row else matrix.ccol_indices()
    inner = (matrix.col_indices() if by_row else matrix.row_indices()).long()
    each = torch.arange(len(starts) - 1, device=matrix.device)
    outer = torch.repeat_interleave(each, starts.diff(), output_size=len(inner))
    return (matrix.values(), outer, inner) if by_row else (matrix.values(), inner, outer)


def _sort(targets: Tensor, sources: Tensor, neurons: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """``indptr`` and int32 targets by source, then target, and the order that does it: None where it was so."""
    after, before = slice(1, None), slice(None, -1)
    rises = (sources[after] > sources[before]) | ((sources[after] == sources[before]) & (targets[after] >= targets[before]))
    if bool(rises.all()):
        indptr = torch.searchsorted(sources.contiguous(), torch.arange(count + 1, device=sources.device))
        return indptr, targets.to(torch.int32).contiguous(), None
    if sources.device.type == "cpu" and len(sources) >= COUNTED_FROM:
        from ..backend.cpu.sorting import order_of

        onto, origins = (part.to(torch.int64).contiguous().numpy() for part in (targets, sources))
        indptr, order = map(torch.from_numpy, order_of(onto, origins, neurons, count))
    else:
        order = torch.sort(sources * neurons + targets, stable=True).indices
        indptr = torch.searchsorted(sources[order], torch.arange(count + 1, device=sources.device))
    targets = targets[order]
    return indptr, targets.to(torch.int32).contiguous(), order


def _permute(values: Any, order: Tensor | None) -> Any:
    """A tensor of values in another order, if each synapse has one; None of None."""
    if values is None or order is None or values.dim() == 2 or values.shape[0] != len(order):
        return values
    return values.index_select(0, order)


def record_of(indptr: Tensor, targets: Tensor, weights: Tensor, delays: Tensor | None, neurons: int) -> Synapses:
    """The record of what is sorted, after a look at every number."""
    weights = as_in_memory(weights)
    low, high = limits(weights)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"weights must be finite, got {example(weights)}; correct them where they come from")
    limit = torch.finfo(torch.float64 if weights.dtype == torch.float64 else torch.float32).max
    if max(-low, high) > limit / max(len(targets), 1):
        synapses = Synapses(indptr, targets, weights, None, neurons, 0.0, 0.0)
        each = each_of(weights.detach(), synapses.source_of())
        sums = torch.zeros(neurons, dtype=torch.float64, device=targets.device)
        sums.index_add_(0, targets.long(), each.double().abs())
        for neuron in (sums > limit).nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"weights must have a finite sum of magnitudes for each neuron, at most {limit:.3g}, got more for neuron "
                f"{neuron}; check their unit, which is that of g_l"
            )
    shortest = longest = 0.0
    if delays is not None:
        delays, shortest, longest = delays_of(as_in_memory(delays), "delays")
        if shortest == longest and delays.numel() > 1:
            delays = delays.flatten()[:1].clone()
        if not delays.numel():
            delays = delays.new_zeros(1)
    return Synapses(indptr, targets, weights, delays, neurons, shortest + 0.0, longest + 0.0)


def of_dense(matrix: Tensor, delays: Any, span: tuple[float, float] | None = None) -> Synapses:
    """One synapse for every entry of a matrix ``[N, K]``, and delays as :meth:`Synapses.from_torch` takes them.

    With ``span``, the shortest and the longest delay in ms, no number is looked at, which a compiler would not follow.
    """
    neurons, sources = matrix.shape
    taken = None
    if delays is not None:
        taken = to_tensor(delays, "delays", matrix.device)
        if taken.shape == matrix.shape:
            taken = taken.t().reshape(-1)
        elif taken.shape == (sources,):
            taken = taken.unsqueeze(1)
        elif taken.numel() != 1 or taken.dim() > 1:
            raise ValueError(
                f"delays must be a number, [K]=[{sources}] or [N, K]={list(matrix.shape)} for a dense matrix, got shape "
                f"{list(taken.shape)}; pass one number to share it"
            )
        taken = taken.reshape(1) if taken.dim() == 0 else taken
    indptr = torch.arange(sources + 1, device=matrix.device) * neurons
    targets = torch.arange(neurons, dtype=torch.int32, device=matrix.device).repeat(sources)
    if span is None:
        return record_of(indptr, targets, matrix.t().reshape(-1), taken, neurons)
    single = None if taken is None else taken.to(torch.float32)
    return Synapses(indptr, targets, matrix.t().reshape(-1), single, neurons, *span)


def in_memory(synapses: Synapses) -> Synapses:
    """The same with weights and delays that are in memory as they are, see :func:`as_in_memory`."""
    delays = None if synapses.delays is None else as_in_memory(synapses.delays)
    return synapses._replace(weights=as_in_memory(synapses.weights), delays=delays)


def steps_of(shortest: float, longest: float, dt: float) -> tuple[int, int]:
    """The shortest and the longest delay, which are in ms, in steps of ``dt`` ms."""
    per_ms = _single(1.0 / check_dt(dt))
    first, last = round(_single(shortest * per_ms)), round(_single(longest * per_ms))
    if first < 1:
        raise ValueError(
            f"a delay must be at least one step of dt={dt:g} ms, got {shortest:g} ms; lengthen it, or make dt smaller"
        )
    if last > MOST:
        raise ValueError(
            f"a delay must be at most {MOST:,} steps of dt={dt:g} ms, got {longest:g} ms; shorten it, or make dt larger"
        )
    return first, last


def _single(number: float) -> float:
    """A number rounded to the 24 bits of float32, in operations that a compiler follows."""
    shift = math.ldexp(1.5, math.frexp(number)[1] + 28)
    return (number + shift) - shift


def each_of(values: Tensor, sources: Tensor) -> Tensor:
    """The weight or delay of each synapse, ``[S]``, from ``[S]``, ``[K, 1]`` or ``[1]`` and the ``sources [S]``."""
    return values.flatten().index_select(0, sources) if values.dim() == 2 else values.expand(sources.shape)


def _merge(values: list[Tensor], fans: list[Tensor], sources: list[Tensor], order: Tensor | None, indptr: Tensor) -> Tensor:
    """One tensor that says what those of several parts say, as small as can be.

    Args:
        values: of each part, ``[S']``, ``[K, 1]`` or ``[1]``.
        fans: which sources have synapses in each part, ``[K]``.
        sources: of the synapses of each part, ``[S']``.
        order: that sorts all of them.
        indptr: of the result.
    """
    shared = [value.dim() == 2 or value.shape[0] == 1 for value in values]
    if all(shared) and all(value is values[0] for value in values):
        return values[0]
    tracked = any(map(is_tracked, values))
    if all(shared):
        together, taken, apart = values[0].new_zeros(fans[0].shape), torch.zeros_like(fans[0]), True
        for value, fan in zip(values, fans, strict=True):
            rows = (value[:, 0] if value.dim() == 2 else value).expand(fan.shape)
            clash = taken & fan
            apart = apart and not bool((clash if tracked else clash & (rows != together)).any())
            together, taken = torch.where(fan & ~taken, rows, together), taken | fan
        if apart and tracked:
            return together.unsqueeze(1)
        if apart:
            used = together[taken]
            if not len(used) or bool((used == used[0]).all()):
                return (used if len(used) else values[0].flatten())[:1].clone()
            return torch.where(taken, together, used[0]).unsqueeze(1)
    each: Tensor = _permute(torch.cat([each_of(*part) for part in zip(values, sources, strict=True)]), order)
    if tracked or not len(each):
        return each
    if bool((each == each[0]).all()):
        return each[:1].clone()
    fan_out = indptr.diff()
    if len(fan_out) < len(each):
        rows = torch.where(fan_out > 0, each[indptr[:-1].clamp(max=len(each) - 1)], each[0])
        if bool((each == torch.repeat_interleave(rows, fan_out, output_size=len(each))).all()):
            return rows.unsqueeze(1)
    return each


def _describe(weights: Tensor) -> str:
    """What a user sees of weights."""
    if type(weights) not in (Tensor, torch.nn.Parameter) or weights.device.type == "meta" or is_watched():
        return f"{list(weights.shape)} of {str(weights.dtype).removeprefix('torch.')}"
    return _span(*limits(weights))


def _span(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _read_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """Read one array. Memory is taken for it only if the file is as long as its header says."""
    with file.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_column, kind = read_header[version](member)
        size = kind.itemsize * math.prod(shape)
        if kind.hasobject or size > info.file_size or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is {kind} of shape {list(shape)}, in {info.file_size:,} bytes")
        array = np.empty(size, np.uint8)
        for begin in range(0, size, PIECE_BYTES):
            piece = array[begin : begin + PIECE_BYTES]
            piece[:] = np.frombuffer(member.read(len(piece)), np.uint8)
        if member.read(1):  # at the end of the data, zipfile compares its checksum
            raise ValueError(f"{info.filename} is longer than its shape")
    return array.view(kind).reshape(shape, order="F" if by_column else "C")


# an exported program that takes or returns one can be saved, and torch.load(weights_only=True) reads what holds one
torch.utils._pytree._register_namedtuple(Synapses, serialized_type_name="coba_triton.Synapses")
torch.serialization.add_safe_globals([Synapses])
