"""Weights from the input's channels to the neurons, and among the neurons. They are drawn at random or read from files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coba_triton.common.files import reason

from .config import Config, FanOut, FileWeights, RandomSynapses
from .errors import UserError

_SYNAPSES = (("row", "col", "weight"), ("row", "col", "data"))  # names of the arrays of an .npz that lists synapses
_SCIPY = {"format", "shape", "data"}  # arrays in every .npz that scipy.sparse.save_npz writes
_POPULATIONS = {1: "excitatory", -1: "inhibitory", 0: "other"}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within the block, an error while the file is read becomes a UserError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is no regular file")  # a pipe would wait for a writer
        yield
    except (MemoryError, UserError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give a .npy or .npz file") from None
    except Exception:  # every kind of archive and compression has its own exception for a damaged file
        raise UserError(f"{path} is no .npy or .npz file of numbers; write it with numpy.save or numpy.savez") from None


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an ``.npz`` file; empty for a ``.npy`` file.

    Raises:
        UserError: if the file cannot be read.
    """
    with _readable(path), path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            return []
        file.seek(0)
        with np.load(file) as archive:
            return list(archive.files)


def read_array(path: Path, name: str | None) -> Any:
    """Read an array from a ``.npy`` (memory-mapped) or ``.npz`` file, or scipy's sparse array from its own ``.npz`` file.

    Raises:
        UserError: if the file cannot be read, or it is not clear which array of an ``.npz`` is meant.
    """
    names = array_names(path)
    if name is None and set(names) >= _SCIPY:
        return read_sparse(path)
    if len(names) > 1 and name is None:
        raise UserError(f"{path} holds several arrays; name one with the key array: {', '.join(names)}")
    if names and name not in (None, *names):
        raise UserError(f"{path} has no array {name!r}; it has {', '.join(names)}")
    with _readable(path):
        if not names:
            return np.asarray(np.load(path, mmap_mode="r"))
        with np.load(path) as archive:
            return np.asarray(archive[name or names[0]])


def read_sparse(path: Path) -> Any:
    """Read the file that ``scipy.sparse.save_npz`` has written, as an array that is sliced by rows.

    Raises:
        UserError: if scipy is missing or the file is damaged.
    """
    try:
        from scipy.sparse import load_npz
    except ImportError:
        raise UserError(f'{path} needs the package scipy, which is missing; run: pip install "coba-triton[cli]"') from None
    with _readable(path):
        try:
            return load_npz(path).tocsr()
        except KeyError as error:
            raise UserError(f"{path} is a damaged sparse array, without {error}; write it with save_npz") from None


def dense(rows: Any) -> NDArray[Any]:
    """A sparse array as an ordinary one; other arrays as they are."""
    return np.asarray(rows.toarray() if hasattr(rows, "toarray") else rows)


def read_weights(settings: FileWeights, shape: tuple[int, int], key: str) -> NDArray[np.float32]:
    """Read weights in uS from a file.

    The file has an array, which may be sparse, or a list of synapses with rows, columns and weights. Weights of the same
    row and column add up.

    Args:
        settings: the file, and the weight that the number 1 in it stands for.
        shape: the shape that the array must have.
        key: the table of the configuration that names the file, for messages.

    Returns:
        Weights of ``shape``.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    path, names = settings.path, set(array_names(settings.path))
    listed_as = next((lists for lists in _SYNAPSES if names >= set(lists)), None)
    if settings.array is None and listed_as and not names >= _SCIPY:
        row, col, values = (read_array(path, name) for name in listed_as)
        listed = row.ndim == 1 and row.shape == col.shape == values.shape
        if not (listed and {row.dtype.kind, col.dtype.kind} <= {"i", "u"}):
            raise UserError(
                f"{key}: row, col and {listed_as[2]} in {path} must be of one length, the first two integers, got "
                f"{row.dtype} {list(row.shape)}, {col.dtype} {list(col.shape)} and {list(values.shape)}; give all three a "
                "number for every synapse"
            )
        rows, cols = row.astype(np.int64), col.astype(np.int64)
        for name, index, size in (("row", rows, shape[0]), ("col", cols, shape[1])):
            if index.size and (index.min() < 0 or index.max() >= size):
                raise UserError(
                    f"{key}: {name} in {path} must be from 0 to {size - 1}, got {index.min()} to {index.max()}; change "
                    "the file or neuron.count"
                )
        _check_numbers(values, path, key)
        matrix = np.bincount(rows * shape[1] + cols, values.astype(np.float64), shape[0] * shape[1]).reshape(shape)
    else:
        values = dense(read_array(path, settings.array))
        if values.shape != shape:
            raise UserError(
                f"{key}: {path} must have the shape {list(shape)}, rows post-synaptic, got {list(values.shape)}; "
                "change the array or neuron.count"
            )
        _check_numbers(values, path, key)
        matrix = values.astype(np.float64)
    return (matrix * settings.weight).astype(np.float32)


def _check_numbers(values: NDArray[Any], path: Path, key: str) -> None:
    if values.dtype.kind not in "biuf":
        raise UserError(f"{key}: {path} must hold numbers, got {values.dtype}; convert it")
    if not np.isfinite(values).all():
        raise UserError(f"{key}: {path} has NaN or infinity; weights must be finite")


def input_weights(settings: FanOut | FileWeights, neurons: int, channels: int) -> NDArray[np.float32]:
    """Weights from the input's channels to the neurons, from a file or at random.

    Random connections exist with the given probability. The given fraction of them is excitatory, the others are inhibitory
    (negative). Their strengths are exponentially distributed.

    Returns:
        Weights in uS, ``[N, I]``.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    if isinstance(settings, FileWeights):
        return read_weights(settings, (neurons, channels), "input.fan_out")
    rng = np.random.default_rng(settings.seed)
    shape = (channels, neurons)
    strength = rng.exponential(settings.weight, shape)
    sign = np.where(rng.random(shape) < settings.excitatory_fraction, 1.0, -1.0)
    connected = rng.random(shape) < settings.probability
    return np.ascontiguousarray((strength * sign * connected).astype(np.float32).T)


@dataclass(frozen=True)
class Recurrent:
    """The synapses among the neurons.

    Attributes:
        weights: weights in uS, rows post-synaptic, ``[N, N]``.
        signs: 1 for an excitatory neuron, -1 for an inhibitory one, 0 for one that is both or has no synapses, ``[N]``.
        provenance: the origin of the weights: a seed, or a file and its checksum.
    """

    weights: NDArray[np.float32]
    signs: NDArray[np.int8]
    provenance: dict[str, Any]

    @property
    def synapses(self) -> int:
        """The number of weights that are not zero."""
        return int(np.count_nonzero(self.weights))

    def populations(self) -> dict[str, NDArray[np.bool_]]:
        """Masks ``[N]`` of the neurons that are excitatory, inhibitory or neither, without empty ones."""
        members = {name: self.signs == sign for sign, name in _POPULATIONS.items()}
        return {name: mask for name, mask in members.items() if mask.any()}


def open_recurrent(config: Config) -> Recurrent | None:
    """The recurrent weights of a configuration; None if its neurons are not connected.

    Raises:
        UserError: if a file cannot be read or does not fit.
    """
    settings, neurons = config.recurrent, config.neuron.count
    if settings is None:
        return None
    if isinstance(settings, RandomSynapses):
        return draw_recurrent(settings, neurons)
    weights = read_weights(settings, (neurons, neurons), "recurrent")
    with settings.path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    signs = np.subtract((weights > 0).any(0), (weights < 0).any(0), dtype=np.int8)
    return Recurrent(weights, signs, {"file": str(settings.path), "sha256": checksum})


def draw_recurrent(settings: RandomSynapses, neurons: int) -> Recurrent:
    """Draw random synapses: each neuron has a synapse to each other neuron with the same probability, and none to itself.

    The first neurons are excitatory, as many as the given fraction says, and the others are inhibitory. All synapses of a
    neuron, a column of the weights, have its sign.
    """
    excitatory = round(settings.excitatory_fraction * neurons)
    signs = np.where(np.arange(neurons) < excitatory, 1, -1).astype(np.int8)
    strength = np.where(signs > 0, settings.excitatory_weight, -settings.inhibitory_weight).astype(np.float32)
    rng = np.random.default_rng(settings.seed)
    connected = rng.random((neurons, neurons), dtype=np.float32) < settings.probability
    np.fill_diagonal(connected, False)
    return Recurrent(np.where(connected, strength, np.float32(0)), signs, {"seed": settings.seed})
