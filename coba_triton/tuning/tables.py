"""Launch parameters: which ones there are, and the tables in which a launch looks them up.

No launch parameter changes a bit of a result. ``coba-triton tune`` measures them and writes tables; nothing else does. A
launch looks into these tables, in this order:

1. the table named by :func:`use`, or by the environment variable ``COBA_TRITON_TUNING`` (``off``: no table at all),
2. the user's table for the device, ``~/.cache/coba_triton/tuning/DEVICE.json`` (or in ``XDG_CACHE_HOME``),
3. a table for the device that comes with the package, ``coba_triton/tuning_tables/DEVICE.json``.

It takes the first table with an entry for the same kernel and dtype, and for at least half and at most twice as many neurons
and batch rows; the number of steps does not matter. Without such an entry, the launcher's own rule decides.
:func:`explain` says where the parameters of a launch come from.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backend.choose import choose_backend, launcher, the_device
from ..common.files import is_there, read_json, reason
from ..common.warned import warn

FORMAT = "coba_triton tuning table"
VERSION = 2
VARIABLE = "COBA_TRITON_TUNING"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LARGEST = 2**62  # the largest number of neurons or batch rows in an entry

Parameters = dict[str, int]

_WARPS = (1, 2, 4, 8, 16)
_AHEAD = (1, 2, 4, 8, 16)
# What the parameters are.
MEANINGS = {
    "num_warps": "warps of a program, whose threads have a neuron each",
    "steps": "steps whose input is loaded ahead or, backward, that are computed again in registers at a time",
    "events_ahead": "rows of weights that are loaded ahead",
    "tile": "neurons that are updated together",
    "replay_warps": "warps of the kernel that computes states again",
    "checkpoint_every": "steps between two saved states",
    "threads": "the largest number of threads",
}
# The parameters of every kernel, and the values that a table may name and that tuning tries.
SPACE: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "triton": {
        # warps of a program, whose threads have a neuron each; steps whose inputs are loaded ahead (inference)
        "feed_forward_forward": {"num_warps": _WARPS, "steps": (2, 4, 8, 16)},
        # steps that are computed again in registers at a time
        "feed_forward_backward": {"num_warps": _WARPS, "steps": (2, 4, 8)},
        # rows of weights that are loaded ahead; neurons that are updated at a time if a row is long
        "recurrent_forward": {"num_warps": _WARPS, "events_ahead": _AHEAD, "tile": (512, 1024, 2048, 4096)},
        # warps of the kernel that goes back through time, if every step is a launch; warps of the one that recomputes states
        "recurrent_backward": {"num_warps": _WARPS, "replay_warps": _WARPS},
    },
    "cpu": {
        # neurons that go through time together; the largest number of threads
        "feed_forward_forward": {"tile": (64, 128, 256, 512, 1024), "threads": tuple(range(1, 513))},
        # steps between two saved states
        "feed_forward_backward": {
            "tile": (64, 128, 256, 512, 1024),
            "threads": tuple(range(1, 513)),
            "checkpoint_every": (16, 32, 64),
        },
        "recurrent_forward": {"threads": tuple(range(1, 513))},
        "recurrent_backward": {"threads": tuple(range(1, 513))},
    },
}
KERNELS = tuple(SPACE["triton"])
PACKAGE = Path(__file__).parents[1]
_SOURCES = {
    "triton": ("kernels", "neuron"),
    "cpu": ("backend/cpu", "backend/reference.py", "neuron"),
}


class Machine(NamedTuple):
    """The backend and the device that a table is made for.

    Attributes:
        backend: ``triton`` or ``cpu``.
        arch: ``sm_90``, ``gfx942``, ``x86_64``, ..., or ``interpreter``.
        name: the name of the device.
    """

    backend: str
    arch: str
    name: str


class Entry(NamedTuple):
    """An entry of a table: a launch and its tuned parameters."""

    kernel: str
    dtype: str
    neurons: int
    batch: int
    parameters: Parameters


class Choice(NamedTuple):
    """The parameters of a launch and where they come from.

    Attributes:
        parameters: the values by name.
        source: the file of the table, or ``rule`` for the launcher's own rule.
        reason: why this source serves the launch, in a sentence.
    """

    parameters: Parameters
    source: str
    reason: str

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{values}\nfrom: {self.source}\nwhy: {self.reason}"


class TableError(ValueError):
    """A tuning table cannot be used; the message says why."""


def cpu_name() -> str:
    """The processor's name, as the operating system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def machine(backend: str, device: torch.device) -> Machine:
    """The machine for whose name a launch looks up tables.

    Raises:
        RuntimeError: if Triton is not installed or has no driver.
    """
    if backend == "cpu":
        return Machine("cpu", platform.machine().lower(), cpu_name())
    import triton

    if triton.knobs.runtime.interpret:
        return Machine("triton", "interpreter", f"Triton's interpreter on {cpu_name()}")
    target = triton.runtime.driver.active.get_current_target()
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]
    name = cpu_name() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return Machine("triton", arch, str(name))


@functools.cache
def source_hash(backend: str) -> str:
    """A digest of a backend's kernels. Times that were measured with other kernels do not count for these."""
    digest = hashlib.sha256()
    for name in _SOURCES[backend]:
        place = PACKAGE / name
        if name == "kernels" and not place.is_dir():  # a checkout without symbolic links has no coba_triton/kernels
            place = PACKAGE.parent / name
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _file_name(device: str) -> str:
    """The name of the table for a device. Cards of one architecture, such as an H100 and an H200, have different tables."""
    return "_".join(re.findall(r"\w+", device)) + ".json"


def user_table(device: str) -> Path | None:
    """The user's table, which ``coba-triton tune`` writes by default. None if the user has no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    try:
        return Path(cache).expanduser() / "coba_triton" / "tuning" / _file_name(device)
    except RuntimeError:
        return None


def shipped_table(device: str) -> Path:
    """The table for a device that comes with the package; it may not exist."""
    return PACKAGE / "tuning_tables" / _file_name(device)


def check_parameters(backend: str, kernel: str, parameters: Any) -> Parameters:
    """Check the parameters for a launch of ``kernel``, and return them.

    Raises:
        TableError: if a name is unknown or missing, or a value is not allowed.
    """
    space = SPACE[backend].get(kernel) if isinstance(kernel, str) else None
    if space is None:
        raise TableError(f"unknown kernel {kernel!r:.200}; expected one of {', '.join(KERNELS)}")
    if not isinstance(parameters, dict) or parameters.keys() != space.keys():
        raise TableError(f"parameters of {kernel} must be {', '.join(space)}, got {parameters!r:.200}")
    for name, value in parameters.items():
        if type(value) is not int or value not in space[name]:
            raise TableError(f"{name} of {kernel} must be one of {_values(space[name])}, got {value!r:.200}")
    return parameters


def _values(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values)) if len(values) < 10 else f"{values[0]} to {values[-1]}"


def read_table(path: Path) -> dict[str, Any]:
    """Read a table and check its form.

    Raises:
        TableError: if it cannot be read, is not a table of this version, or an entry is malformed.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise TableError(f"cannot be read ({reason(error)})") from None
    except ValueError as error:
        raise TableError(f"is no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise TableError(f"is no tuning table: expected a JSON object with format {FORMAT!r} and a list of entries")
    if content.get("version") != VERSION:
        raise TableError(f"is of version {content.get('version')!r:.200}, expected {VERSION}")
    if content.get("backend") not in tuple(SPACE) or not isinstance(content.get("device"), str):
        raise TableError(
            f"is for {content.get('backend')!r:.200} on {content.get('device')!r:.200}, expected {' or '.join(SPACE)} on a "
            "device's name"
        )
    for entry in content["entries"]:
        _check_entry(content["backend"], entry)
    return content


def _check_entry(backend: str, entry: Any) -> None:
    well = isinstance(entry, dict) and entry.get("dtype") in tuple(DTYPES) and isinstance(entry.get("sources"), str)
    if not well or not all(type(entry.get(size)) is int and 0 < entry[size] <= LARGEST for size in ("neurons", "batch")):
        raise TableError(f"has a malformed entry: {entry!r:.200}")
    check_parameters(backend, entry.get("kernel"), entry.get("parameters"))


def entries_for(content: dict[str, Any], target: Machine) -> list[Entry]:
    """The entries of a table from :func:`read_table` that were measured on this machine, with these kernels.

    Raises:
        TableError: if the table is for another backend, another device or other kernels.
    """
    found = content["backend"], content["device"]
    if found != (target.backend, target.name):
        raise TableError(f"is for {found[0]} on {found[1]}, expected {target.backend} on {target.name}")
    current = [entry for entry in content["entries"] if entry["sources"] == source_hash(target.backend)]
    if content["entries"] and not current:
        raise TableError("was measured with other kernels than this version's")
    return [Entry(*(entry[field] for field in Entry._fields)) for entry in current]


_explicit: str | None = None
forced_parameters: dict[str, Parameters] = {}


def use(path: str | os.PathLike[str] | None) -> None:
    """Let launches look into this table first.

    Args:
        path: the table; ``"off"`` for no table at all; None to do what the environment variable says.

    Raises:
        ValueError: if the file cannot be read or is no tuning table.
    """
    global _explicit
    if path is not None and path != "off":
        try:
            read_table(Path(path))
        except TableError as error:
            raise TableError(f"{path} {error}; make one with: coba-triton tune") from None
    _explicit = None if path is None else os.fspath(path)
    forget()


def forget() -> None:
    """Forget all tables, so that the next launch reads them again."""
    _tables.cache_clear()
    _find.cache_clear()


def _named() -> str | None:
    return _explicit or os.environ.get(VARIABLE)


def sources(device: str) -> list[Path]:
    """The files that launches on a device look into, in this order. They may not exist."""
    explicit = _named()
    if explicit == "off":
        return []
    files = Path(explicit) if explicit else None, user_table(device), shipped_table(device)
    return [path for path in files if path is not None]


@functools.cache
def _tables(target: Machine) -> tuple[tuple[Path, list[Entry]], ...]:
    """Read every table that can be used, and warn of those that exist and cannot be used."""
    tables = []
    for path in sources(target.name):
        if not is_there(path) and path in (user_table(target.name), shipped_table(target.name)):
            continue  # only a table that the user has named must exist
        try:
            tables.append((path, entries_for(read_table(path), target)))
        except TableError as error:
            warn(f"tuning table {path} {error}; it is ignored: tune again with coba-triton tune, or remove it")
    return tuple(tables)


@functools.lru_cache(4096)
def _find(target: Machine, kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> tuple[Path, Entry] | None:
    for path, entries in _tables(target):
        near = []
        for entry in entries:
            away = abs(math.log2(entry.neurons / neurons)), abs(math.log2(entry.batch / batch))
            if (entry.kernel, DTYPES[entry.dtype]) == (kernel, dtype) and max(away) <= 1:
                near.append((sum(away), entry))
        if near:
            return path, min(near, key=lambda pair: pair[0])[1]
    return None


def launch_parameters(
    backend: str, kernel: str, heuristic: Parameters, dtype: torch.dtype, device: torch.device, neurons: int, batch: int = 1
) -> Mapping[str, int]:
    """The parameters for a launch of ``kernel``: from a table's entry, else ``heuristic``, the launcher's own rule.

    Feed-forward kernels have no batch: for them ``neurons`` counts the neurons of all rows.
    """
    if forced := forced_parameters.get(kernel):
        return heuristic | forced
    if _named() == "off":
        return heuristic
    found = _find(machine(backend, device), kernel, dtype, max(1, neurons), max(1, batch))
    return heuristic if found is None else heuristic | found[1].parameters


@contextmanager
def off() -> Iterator[None]:
    """Within the block, launches look into no table."""
    global _explicit
    before, _explicit = _explicit, "off"
    try:
        yield
    finally:
        _explicit = before


@contextmanager
def forced(kernel: str, parameters: Parameters) -> Iterator[None]:
    """Within the block, launch ``kernel`` with these parameters, whatever the tables say. Not safe with several threads."""
    before = dict(forced_parameters)
    forced_parameters[kernel] = parameters
    try:
        yield
    finally:
        forced_parameters.clear()
        forced_parameters.update(before)


def heuristic(backend: str, kernel: str, dtype: torch.dtype, neurons: int, batch: int = 1) -> Parameters:
    """The parameters that the launcher's own rule gives."""
    return launcher(backend).heuristic(kernel, dtype, neurons, batch)


def explain(
    kernel: str,
    neurons: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Choice:
    """Say which parameters a launch takes, from where, and why.

    Args:
        kernel: a name in :data:`KERNELS`.
        neurons: N of one batch row.
        batch: B.
        dtype: float32 or float64.
        device: the device of the tensors.
        backend: the backend, as for the public functions.

    Raises:
        ValueError: if the kernel or dtype is unknown, a size is not positive, or the backend has no launches to tune.
        RuntimeError: if the backend that was asked for cannot serve.

    Example:
        >>> print(explain("feed_forward_forward", 1024, batch=32))  # doctest: +SKIP
        tile=1024, threads=2
        from: rule
        why: no table has an entry for ...
    """
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r:.200}")
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype) or name not in DTYPES:
        raise ValueError(
            f"dtype must be torch.float32 or torch.float64, which state and arithmetic have, got {dtype!r:.200}"
        )
    for size in (neurons, batch):
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
            raise ValueError(f"neurons and batch must be positive, got {neurons!r:.50} and {batch!r:.50}")
    device = the_device(device)
    backend = choose_backend(backend, device)
    if backend == "reference":
        raise ValueError("backend 'reference' has no launch parameters; pass backend='triton' or 'cpu'")
    if kernel.startswith("feed_forward"):
        neurons, batch = neurons * batch, 1
    target = machine(backend, device)
    rule = heuristic(backend, kernel, dtype, neurons, batch)
    found = _find(target, kernel, dtype, neurons, batch)
    what = f"{kernel}, {name}, neurons={neurons}, batch={batch}"
    if found is not None:
        path, entry = found
        return Choice(
            rule | entry.parameters, str(path), f"its entry for neurons={entry.neurons}, batch={entry.batch} serves {what}"
        )
    looked = [
        f"{path} ({'used' if path in dict(_tables(target)) else 'unusable' if is_there(path) else 'not there'})"
        for path in sources(target.name)
    ]
    where = f"looked into {', '.join(looked)}" if looked else f"tables are off ({VARIABLE}=off)"
    return Choice(rule, "rule", f"no table has an entry for {what} on {target.name}; {where}")
