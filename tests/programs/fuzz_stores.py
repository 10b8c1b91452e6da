"""Damages results of long runs at random, and tells whether they give the right data, or a sentence.

    PYTHONPATH=tests python -m programs.fuzz_stores 4000 7

tries so many with this seed and prints how often each kind of damage gave what. Whatever is done to a result, reading it and
resuming it must give the data of the undamaged run, or raise a ValueError or a FileNotFoundError. Attributes that somebody
made up, with the right checksum, may say anything: they must not raise anything else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coba_triton import CobaLIF, NpzSink, PoissonSource, Record, ZarrSink, open_result, simulate
from coba_triton.stream.store import describe_group
from helpers.runs import NEURON

STEPS, BLOCK, NEURONS = 700, 96, 20
ALLOWED = (ValueError, FileNotFoundError)
SILLY = [None, True, -1, 0, 1, 2**31, 10**400, 1.5, 1e400, "", "x", "/etc/passwd", "float64", [], [1], [10**10], {}, [[]]]


def everything(path: Path) -> dict[str, Any]:
    """All that a result says."""
    result = open_result(path)
    said = {name: array[:] for name, array in result.traces.items()} | {"spikes": result.spikes[:], **result.populations}
    said |= {f"counts {name}": result.counts(1, name) for name in result.populations}
    said |= {name: result.array(name) for name in ("input_e", "input_i", "recorded", "v_thresh", "signal") if name in result}
    said |= {"parameter": result.parameter("v_thresh"), "steps": result.steps, "finished": result.finished, "dt": result.dt}
    return said | ({"state": np.stack([field.numpy() for field in result.state])} if result.steps else {})


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results say the same."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class _Stop(Exception):
    pass


def _run(sink: Any, seed: int = 2, blocks: int = 100, resume: bool = False) -> None:
    def progress(done: int) -> None:
        if done >= blocks * BLOCK:
            raise _Stop

    record = Record(
        variables=("v", "g_e"), neurons=[7, 0], populations={"first": range(5), "L2/3": range(1, 20, 2)}, inputs=True
    )
    source: Any = PoissonSource(1500.0, STEPS, (NEURONS,), 0.1, weight=2**-9, seed=seed)[:]
    network = CobaLIF(NEURON, 0.1)
    options: dict[str, Any] = {"record": record, "block_steps": BLOCK, "progress": progress, "resume": resume}
    with contextlib.suppress(_Stop):
        simulate(network, source, sink=sink, **options)


def _zarr(path: Path) -> ZarrSink:
    return ZarrSink(path, arrays={"signal": np.arange(50.0)}, attributes={"animal": "a mouse"})


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _flip(path: Path, draw: random.Random, others: list[Path]) -> None:
    file = draw.choice(_files(path))
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 5])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _cut(path: Path, draw: random.Random, others: list[Path]) -> None:
    file = draw.choice(_files(path))
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def _append(path: Path, draw: random.Random, others: list[Path]) -> None:
    file = draw.choice(_files(path))
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.choice([1, 4, 100])))


def _delete(path: Path, draw: random.Random, others: list[Path]) -> None:
    if draw.random() < 0.2:
        shutil.rmtree(draw.choice([entry for entry in path.iterdir() if entry.is_dir()]))
        return
    draw.choice(_files(path)).unlink()


def _exchange(path: Path, draw: random.Random, others: list[Path]) -> None:
    chunks = [file for file in _files(path) if file.name != "zarr.json"]
    one = draw.choice(chunks)
    other = draw.choice([file for file in chunks if file.parent == one.parent or draw.random() < 0.1])
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _take_over(path: Path, draw: random.Random, others: list[Path]) -> None:
    """Files of another run, or of the same one at another time."""
    other = draw.choice(others)
    files = [file.relative_to(other) for file in _files(other) if (path / file.relative_to(other)).exists()]
    for file in draw.sample(files, draw.choice([1, 1, 2, 3])):
        shutil.copy(other / file, path / file)


def _make_up(path: Path, draw: random.Random, others: list[Path]) -> None:
    content = json.loads((path / "zarr.json").read_text())["attributes"]
    _change(content, draw)
    (path / "zarr.json").write_text(describe_group(content))


def _make_up_npz(path: Path, draw: random.Random, others: list[Path]) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = draw.choice([*arrays, "attributes", "attributes"])
    if name == "attributes":
        content = json.loads(str(arrays[name]))
        _change(content, draw)
        arrays[name] = np.array(json.dumps(content))
    else:
        arrays[name] = draw.choice([arrays[name][:-1] if arrays[name].ndim else arrays[name], np.arange(3), np.array("x")])
    np.savez_compressed(path, **arrays)


def _change(content: Any, draw: random.Random) -> None:
    """Another value somewhere, or none, or one that was not there."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and draw.random() < 0.8:
            content = content[key]
            continue
        if isinstance(content, dict) and draw.random() < 0.2:
            del content[key]
        else:
            content[key] = copy.deepcopy(draw.choice(SILLY))
        return


Damage = Callable[[Path, random.Random, list[Path]], None]
DAMAGES: dict[str, Damage] = {
    "flipped bits": _flip,
    "cut file": _cut,
    "longer file": _append,
    "deleted": _delete,
    "exchanged": _exchange,
    "taken from another run or time": _take_over,
    "made-up attributes": _make_up,
}
NPZ_DAMAGES: dict[str, Damage] = {
    "npz: flipped bits": _flip,
    "npz: cut": _cut,
    "npz: longer": _append,
    "npz: made up": _make_up_npz,
}


def _outcome(work: Path, truth: dict[str, Any], whole: dict[str, Any], made_up: bool) -> str:
    """What reading and then resuming a damaged result gives."""
    said = []
    for step in ("read", "resume"):
        if step == "resume" and work.suffix == ".npz":
            break
        try:
            if step == "resume":
                _run(_zarr(work), resume=True)
            found = everything(work)
            steps = found["steps"]
            right = (
                same(found, whole)
                if found["finished"]
                else steps <= truth["steps"]
                and np.array_equal(found["spikes"], whole["spikes"][:steps])
                and np.array_equal(found["v"], whole["v"][:steps])
            )
            said.append("right data" if right else "made-up data" if made_up else "WRONG")
        except ALLOWED as error:
            said.append("refused" if len(str(error)) > 20 else f"{type(error).__name__} without a sentence WRONG")
        except Exception as error:
            traceback.print_exc()
            said.append(f"{type(error).__name__} WRONG")
    return ", ".join(f"{step} {what}" for step, what in zip(("read:", "resumed:"), said, strict=False))


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """How often each kind of damage gave what."""
    draw = random.Random(seed)
    folder.mkdir(exist_ok=True)
    part = folder / "part.zarr"
    for blocks, name in ((3, "older"), (4, "one older"), (5, None)):  # the same run at three times
        _run(_zarr(part), blocks=blocks, resume=True)
        if name:
            shutil.copytree(part, folder / f"{name}.zarr")
    _run(_zarr(folder / "whole.zarr"))
    _run(_zarr(folder / "other.zarr"), seed=3, blocks=5)
    _run(NpzSink(folder / "whole.npz", arrays={"signal": np.arange(50.0)}))
    others = [folder / f"{other}.zarr" for other in ("older", "one older", "other", "whole")]
    whole = everything(folder / "whole.zarr")
    outcomes: Counter[str] = Counter()
    for number in range(count):
        kind = draw.choice([*DAMAGES, *NPZ_DAMAGES])
        original = folder / ("whole.npz" if kind in NPZ_DAMAGES else draw.choice(["part.zarr", "whole.zarr"]))
        work = folder / f"damaged{original.suffix}"
        if original.is_dir():
            shutil.copytree(original, work)
        else:
            shutil.copy(original, work)
        (DAMAGES | NPZ_DAMAGES)[kind](work, draw, others)
        outcome = _outcome(work, everything(original), whole, "made" in kind)
        if "WRONG" in outcome:
            print(f"number {number} of seed {seed}, {kind} in {original.name}: {outcome}")
        outcomes[f"{kind}; {outcome}"] += 1
        shutil.rmtree(work) if work.is_dir() else work.unlink(missing_ok=True)
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1, Path(temporary) / "fuzz")
    for line, times in sorted(found.items()):
        print(f"{times:6} {line}")
    sys.exit(any("WRONG" in line for line in found))
