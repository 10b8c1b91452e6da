"""``coba-triton bench``: time this package beside its reference, a compiled step and norse, all in one run.

It writes the times as JSON and as a picture, and can compare them with those of an earlier run.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from coba_triton.common.files import read_json, reason
from coba_triton.stream.plotting import NEUTRAL, OTHER, OURS
from coba_triton.tools import ceilings, contenders
from coba_triton.tools.ceilings import Ceilings
from coba_triton.tools.contenders import Contender
from coba_triton.tools.problems import CASES, Case

from . import info
from .errors import INTERRUPTED, UserError, check_choice
from .output import say
from .shared import check_writable, find_target, write_json, write_picture

FORMAT, VERSION = "coba_triton benchmark", 1
SUITES = {
    "quick": ("inference-small", "training-small", "recurrent-inference-256"),
    "feed-forward": tuple(case.name for case in CASES if case.kind == "feed_forward"),
    "recurrent": tuple(case.name for case in CASES if case.kind == "recurrent"),
    "full": tuple(case.name for case in CASES),
}
# A run is slower if it takes more than this many times as long as before, and if the quartiles of both do not overlap.
TOLERANCE = 1.1


def run(
    suite: str, backend: str, device: str | None, only: str | None, rounds: int, out: Path | None, compare: Path | None
) -> int:
    """Time a suite; returns the exit status."""
    check_choice("--suite", suite, SUITES)
    if rounds < 2:
        raise UserError(f"--rounds must be at least 2, to know the spread, got {rounds}")
    cases = [case for case in CASES if case.name in SUITES[suite] and (only is None or only in case.name)]
    if not cases:
        raise UserError(f"no case of suite {suite} contains {only!r}; it has {', '.join(SUITES[suite])}")
    where, target = find_target(backend, device)
    used = target.backend
    old = None if compare is None else read(compare)
    if out is not None:
        check_writable(out)
    machine, versions = ceilings.measure(where), info.versions()
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "backend": used,
        "device": str(where),
        "name": target.name,
        "arch": target.arch,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "rounds": rounds,
        "copy_gb_per_s": machine.bytes / 1e9,
        "product_gflop_per_s": machine.flops / 1e9,
        "cases": [],
    }
    if old is not None:
        _check_comparable(old, result, compare)
    say(f"{used} on {where} ({target.name}), {threads_of(result)}, torch {torch.__version__}")
    say(
        f"Copies move {machine.bytes / 1e9:.1f} GB/s, matrix products do {machine.flops / 1e9:.0f} GFLOP/s. Medians of "
        f"{rounds} interleaved calls, ± half of what the quartiles are apart; ns: a neuron and step; speed-up: over the "
        "reference; limit: the shortest time that the memory or the arithmetic of this machine allows, whichever is longer, "
        "as a share of the median."
    )
    if not versions["norse"]:
        say("norse is not installed, and not timed: pip install --no-deps norse==1.1.0 nir nirtorch")
    interrupted = different = False
    for case in cases:
        try:
            measured = measure(case, used, where, rounds, machine)
        except KeyboardInterrupt:
            interrupted = True
            break
        result["cases"].append(measured)
        say(_table(measured))
        for failure in (*measured["failed"], *measured["different"]):
            say(f"not timed: {failure}")
        different |= bool(measured["different"])
    if out is not None and result["cases"]:
        write_json(out, result)
        picture = out.with_suffix(".png")
        write_picture(picture, draw(result))
        say(f"Wrote {out} and {picture}")
    slower = old is not None and _print_ratios(old, result)
    if interrupted:
        say(f"Interrupted after {len(result['cases'])} of {len(cases)} cases.")
        return INTERRUPTED
    return 1 if slower or different else 0


def measure(case: Case, backend: str, device: torch.device, rounds: int, machine: Ceilings) -> dict[str, Any]:
    """Compare every contender of a case with the reference, and time those that agree.

    Returns:
        What the JSON file says about the case. Contenders that do not run here are listed under ``failed``, and those with
        wrong results under ``different``.
    """
    problem = case.build(device)
    failed: list[str] = []
    different: list[str] = []
    able: list[Contender] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        line = progress.add_task(case.name, total=None)
        expected: Tensor | None = None
        results: dict[str, Tensor] = {}
        for contender in contenders.contenders(case, backend, problem):
            progress.update(line, description=f"{case.name}: comparing {contender.name}")
            try:
                if expected is None:
                    expected = contender.run()
                contenders.assert_same(case, contender, expected)
                results[contender.name] = contender.run()
            except (RuntimeError, ImportError) as error:  # a package or a compiler that does not work here
                failed.append(f"{contender.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            except AssertionError as error:
                different.append(f"{error} differ from the reference's")
            else:
                able.append(contender)
        runs = {contender.name: contender.run for contender in able}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        progress.update(line, description=f"{case.name}: timing", total=rounds, completed=0)
        for _ in range(rounds):
            for name, taken in contenders.time_interleaved(runs, 1, device).items():
                seconds[name] += taken
            progress.advance(line)
    spikes = expected
    if case.train or spikes is None:
        spikes = problem.run("reference", order=contenders.ORDER[case.kind])[0]
    rows: list[dict[str, Any]] = []
    for contender in able:
        low, median, high = statistics.quantiles(seconds[contender.name], n=4)
        needed = ceilings.work(case, problem, spikes, results[contender.name])
        least, limit = needed.least(machine)
        rows.append(
            {
                "name": contender.name,
                "same": contender.roundings is not None,
                "note": contender.note,
                "seconds": seconds[contender.name],
                "median_s": median,
                "p25_s": low,
                "p75_s": high,
                "ns_per_neuron_step": median / case.neuron_steps * 1e9,
                "bytes_moved": needed.bytes,
                "flops": needed.flops,
                "limit": limit,
                "percent_of_limit": 100 * least / median,
                "peak_bytes": contenders.peak_memory(contender.run, device),
            }
        )
    for row in rows:
        row["times_reference"] = rows[0]["median_s"] / row["median_s"]
    return {
        "name": case.name,
        "kind": case.kind,
        "T": case.steps,
        "B": case.batch,
        "N": case.neurons,
        "dtype": str(case.dtype).removeprefix("torch."),
        "train": case.train,
        "spikes_per_neuron_step": float(spikes.mean()),
        "contenders": rows,
        "failed": failed,
        "different": different,
    }


def _title(case: dict[str, Any]) -> str:
    return (
        f"{case['name']}: {case['T']} steps of [{case['B']}, {case['N']}], {case['dtype']}, "
        f"{case['spikes_per_neuron_step']:.1%} spikes per neuron and step"
    )


def _table(case: dict[str, Any]) -> Table:
    table = Table(title=_title(case), title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("ms", "± ms", "ns", "speed-up", "limit", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in case["contenders"]:
        spread = (row["p75_s"] - row["p25_s"]) / 2
        table.add_row(
            row["name"] + ("" if row["same"] else " *"),
            f"{row['median_s'] * 1e3:.2f}",
            f"{spread * 1e3:.2f}",
            f"{row['ns_per_neuron_step']:.2f}",
            f"{row['times_reference']:.1f}",
            f"{row['percent_of_limit']:.0f}% {row['limit'][0]}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
    notes = [row["note"] or "another surrogate derivative" for row in case["contenders"] if not row["same"]]
    limits = sorted({row["limit"] for row in case["contenders"]})
    table.caption = "\n".join([f"{limit[0]}: {limit}" for limit in limits] + [f"* {note}" for note in dict.fromkeys(notes)])
    table.caption_justify = "left"
    return table


def draw(result: dict[str, Any]) -> Figure:
    """Draw the time that every contender takes for one neuron and step, on a logarithmic axis."""
    cases = result["cases"]
    figure = Figure((10, 0.8 + sum(0.9 + 0.24 * len(case["contenders"]) for case in cases)), 110, layout="constrained")
    heights = [2 + len(case["contenders"]) for case in cases]
    axes = figure.subplots(len(cases), squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for panel, case in zip(axes, cases, strict=True):
        rows = case["contenders"]
        scale = case["contenders"][0]["ns_per_neuron_step"] / case["contenders"][0]["median_s"]
        for number, row in enumerate(rows):
            ours = row["name"].split(",")[0] == result["backend"]
            color = OURS if ours else NEUTRAL if row["name"] == "reference" else OTHER
            panel.plot([row["p25_s"] * scale, row["p75_s"] * scale], [number, number], color=color, linewidth=3)
            panel.plot(row["ns_per_neuron_step"], number, "o", color=color, markersize=5)
            panel.annotate(
                f"{row['ns_per_neuron_step']:.3g} ns, ×{row['times_reference']:.1f}",
                (row["p75_s"] * scale, number), (6, 0), textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(labelbottom=True)
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(rows)), [row["name"] + ("" if row["same"] else " *") for row in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_title(_title(case), fontsize=9, loc="left")
        panel.set_xlabel("ns for a neuron and step", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(low, high * 2)  # room for the numbers
    panel.set_xlabel(
        "ns for a neuron and step: median and quartiles; × how many times faster than the reference; "
        "* another model or gradient",
        fontsize=8,
    )
    figure.suptitle(f"{result['name']}, {threads_of(result)}, torch {result['versions']['torch']}", fontsize=11)
    return figure


def threads_of(result: dict[str, Any]) -> str:
    """How many threads a benchmark had."""
    return f"{result['threads']} thread{'' if result['threads'] == 1 else 's'}"


def read(path: Path) -> dict[str, Any]:
    """Read the result of an earlier run.

    Raises:
        UserError: if the file cannot be read or is no result of this command.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give a file that coba-triton bench --out wrote") from None
    except ValueError:
        raise UserError(f"{path} is no JSON; give a file that coba-triton bench --out wrote") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is no result of this version's benchmark; give a file that coba-triton bench --out wrote")
    cases = content.get("cases")
    if not isinstance(cases, list) or not all(map(_is_case, cases)):
        raise UserError(f"{path} is damaged: a case is malformed; give a file that coba-triton bench --out wrote")
    return content


def _is_case(case: Any) -> bool:
    """Whether a part of a file is a case: it has everything that is compared."""
    rows = case.get("contenders") if isinstance(case, dict) and isinstance(case.get("name"), str) else None
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(
            isinstance(row, dict)
            and isinstance(row.get("name"), str)
            and all(type(row.get(time)) is float and row[time] > 0 for time in ("median_s", "p75_s"))
            for row in rows
        )
    )


def _check_comparable(old: dict[str, Any], new: dict[str, Any], path: Path | None) -> None:
    for key in ("backend", "arch", "name", "threads"):
        if old.get(key) != new[key]:
            raise UserError(
                f"{path} is of {key} {old.get(key)!r}, this run of {new[key]!r}: only times of one machine compare"
            )


def ratios(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The new time divided by the old one, for every way of this package to run a case that both results have.

    The new time is slower if the ratio exceeds :data:`TOLERANCE`, if it also does so relative to the reference, whose times
    tell how fast the machine was, and if the quartiles of the old and the new times do not overlap.
    """
    before = {
        (case["name"], row["name"]): row | {"reference": case["contenders"][0]["median_s"]}
        for case in old["cases"]
        for row in case["contenders"]
    }
    rows = []
    for case in new["cases"]:
        for row in case["contenders"]:
            past = before.get((case["name"], row["name"]))
            if past is None or row["name"].split(",")[0] != new["backend"]:
                continue
            ratio = row["median_s"] / past["median_s"]
            machine = case["contenders"][0]["median_s"] / past["reference"]
            apart = row["p25_s"] > past["p75_s"]
            slower = apart and ratio / max(1.0, machine) > TOLERANCE
            rows.append({"case": case["name"], "name": row["name"], "ratio": ratio, "machine": machine, "slower": slower})
    return rows


def _print_ratios(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print the ratios; returns whether anything is slower."""
    rows = ratios(old, new)
    if not rows:
        raise UserError("the two runs have no case in common; run the suite of the older one")
    table = Table(title="Time now / time then", title_justify="left")
    for name in ("case", "run", "ratio", "reference's", ""):
        table.add_column(name, justify="left" if name in ("case", "run", "") else "right")
    for row in rows:
        verdict = "SLOWER" if row["slower"] else "faster" if row["ratio"] < 1 / TOLERANCE else ""
        table.add_row(row["case"], row["name"], f"{row['ratio']:.2f}", f"{row['machine']:.2f}", verdict)
    say(table)
    slower = [row for row in rows if row["slower"]]
    apart = f"by more than {TOLERANCE - 1:.0%}, beyond the spread of the times and the change of the reference's"
    say(f"Slower: {len(slower)} of {len(rows)} runs {apart}." if slower else f"No run of {len(rows)} is slower {apart}.")
    return bool(slower)
