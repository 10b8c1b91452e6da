"""Find out on a machine with a GPU, in ten minutes, whether the kernels are right there, and how fast they are.

    make gpu                                    # or: python bench/gpu.py
    python bench/gpu.py --steps smoke,recurrent # run some steps again and keep the results of the others
    python bench/gpu.py --device cpu --small    # try the script on a machine without a GPU

Every step runs in its own process and has a time limit. It writes each result at once, as a line of JSON. So a step that
fails, hangs or runs out of time keeps its results and does not stop the others. The folder ``bench/results/<device>/`` then
has a table, two pictures, and ``results.json`` with the device, the driver, all versions and a hash of the kernels.

Packages that the machine lacks are taken from a folder of wheels (``--wheels``), if there is one. If a package to compare
with is not installed, the results say so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600.0
# The time limit of each step in seconds. If the smoke test fails, the run stops: the rest would mean nothing.
STEPS = {
    "machine": 40,
    "smoke": 60,
    "tests": 120,
    "check": 120,
    "feed-forward": 40,
    "recurrent": 70,
    "networks": 60,
    "few": 20,
    "training": 20,
    "barrier": 30,
    "rivals": 90,
    "digits": 60,
    "tuning": 60,
    "profile": 60,
    "sanitizer": 60,
}
# What an H100 should reach: the case, the run, the key in its results, the value, which kind of bound it is, its unit. As a
# CUDA graph, a call is the kernels alone, and the host has nothing to do.
GRAPH = "triton, graphed"
GOALS = (
    ("feed-forward 262144 inference", GRAPH, "percent_of_copy", 85.0, "at least", "% of the copy bandwidth, float32 spikes"),
    ("feed-forward 262144 training", GRAPH, "percent_of_copy", 75.0, "at least", "% of the copy bandwidth"),
    ("feed-forward 262144 training", GRAPH, "ps_per_neuron_step", 8.0, "at most", "ps for a neuron and step"),
    ("feed-forward 1024 inference", "triton", "host_us", 40.0, "at most", "us on the host"),
    ("recurrent 1024 x 32 inference", GRAPH, "ms_per_1000_steps", 4.0, "at most", "ms for 1000 steps"),
    ("recurrent 256 x 32 inference", "triton", "host_us", 150.0, "at most", "us on the host"),
)


def install(wheels: Path) -> dict[str, str]:
    """The environment variables for the steps. Wheels from the folder, if it has any, are installed beside Python."""
    environment = dict(os.environ)
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if found:
        target = tempfile.mkdtemp(prefix="wheels")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--target", target]
        done = subprocess.run([*command, *map(str, found)], capture_output=True, text=True)
        print(f"{len(found)} wheels from {wheels}" if done.returncode == 0 else f"wheels: {done.stderr.strip()[-300:]}")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [target, environment.get("PYTHONPATH")]))
    paths = [str(ROOT), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def run_step(
    step: str, arguments: argparse.Namespace, out: Path, environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run one step; returns how it ended and how long it took."""
    lines = out / f"{step}.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "bench" / "gpu_steps.py"), step, "--device", arguments.device, "--out", str(out)]
    command += ["--small"] if arguments.small else []
    started = time.monotonic()
    with (out / f"{step}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    seconds = time.monotonic() - started
    if status is None:
        state = f"stopped after {limit:.0f} s"
    else:
        state = "done" if status == 0 else f"failed with exit status {status}, see {step}.log"
    print(f"{step:13} {seconds:6.1f} s  {state}")
    return {"step": step, "seconds": seconds, "state": state, "ok": status == 0}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results that a step has written. A last line that was cut off is left out."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            results.append(json.loads(line))
        except ValueError:
            break
    return results


def collect(out: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Put all results into ``results.json``. Steps that did not run this time keep their earlier results."""
    path = out / "results.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    names = [run["step"] for run in runs]
    kept = [run for run in before["runs"] if run["step"] not in names]
    order = list(STEPS)
    result = {
        "runs": sorted([*kept, *runs], key=lambda run: order.index(run["step"])),
        "results": {step: read_lines(out / f"{step}.jsonl") for step in STEPS},
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def find(result: dict[str, Any], case: str, run: str) -> dict[str, Any]:
    """The result of a run of a case; empty if it was not measured."""
    lines = (line for lines in result["results"].values() for line in lines)
    return next((line for line in lines if (line.get("case"), line.get("run")) == (case, run)), {})


def table(result: dict[str, Any]) -> str:
    """The results in Markdown: a table with a line for each contender, and then the goals."""
    machine = next(iter(result["results"]["machine"]), {})
    lines = [
        f"{machine.get('name', 'unknown device')}; " + ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    ]
    lines += [
        "",
        "| case | run | ms | ps a neuron-step | % of copy | host us | times eager |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    for step in ("feed-forward", "recurrent", "networks", "few", "training", "barrier", "rivals", "digits"):
        for row in result["results"][step]:
            if "missing" in row:
                lines.append(f"| {row['case']} | {row['missing']} | not run: {row['why']} | | | | |")
            elif "median_s" in row:
                lines.append(
                    f"| {row['case']} | {row['run']} | {number(row['median_s'] * 1e3, 3)} | "
                    f"{number(row.get('ps_per_neuron_step'), 2)} | {number(row.get('percent_of_copy'))} | "
                    f"{number(row.get('host_us'), 0)} | {number(row.get('times_eager'))} |"
                )
    lines.append("")
    for case, run, key, goal, sense, what in GOALS if machine.get("driver") else ():
        name, value = f"{case}, {run}", find(result, case, run).get(key)
        if value is None:
            lines.append(f"- {name}: {sense} {goal:g} {what}: not measured")
        else:
            met = value >= goal if sense == "at least" else value <= goal
            lines.append(f"- {name}: {sense} {goal:g} {what}: {value:.3g}, {'reached' if met else 'NOT reached'}")
    for step in ("smoke", "tests", "check", "networks", "tuning", "profile", "sanitizer"):
        lines += [f"- {step}: {row['text']}" for row in result["results"][step] if "text" in row]
    lines += [f"- {run['step']}: {run['state']}, {run['seconds']:.0f} s" for run in result["runs"]]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """Draw a picture for each kind of network: the time for a neuron and step against the number of neurons."""
    from matplotlib.figure import Figure

    machine = next(iter(result["results"]["machine"]), {})
    pictures = []
    for step in ("feed-forward", "recurrent"):
        rows = [row for row in result["results"][step] if "ps_per_neuron_step" in row]
        if not rows:
            continue
        kinds = sorted({row["kind"] for row in rows})
        figure = Figure((5.5 * len(kinds), 4.2), 120, layout="constrained")
        for panel, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            for name in dict.fromkeys(row["run"] for row in rows if row["kind"] == kind):
                points = sorted(
                    (row["cells"], row["ps_per_neuron_step"]) for row in rows if (row["kind"], row["run"]) == (kind, name)
                )
                panel.plot(*zip(*points, strict=True), "o-", label=name, markersize=4, linewidth=1.2)
            panel.set(
                xscale="log",
                yscale="log",
                xlabel="neurons in all rows",
                ylabel="ps for a neuron and step",
                title=f"{step}, {kind}",
            )
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
        figure.suptitle(machine.get("name", "unknown device"), fontsize=10)
        pictures.append(out / f"{step}.png")
        figure.savefig(pictures[-1])
    return pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of: " + ", ".join(STEPS))
    parser.add_argument("--small", action="store_true", help="sizes for practice on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the results; by default bench/results/<device>")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="a folder of wheels of missing packages")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps together")
    arguments = parser.parse_args()
    steps = arguments.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"--steps: unknown {', '.join(unknown)}; there are {', '.join(STEPS)}")
    until = time.monotonic() + arguments.seconds
    environment = install(arguments.wheels)
    if arguments.out is None:
        name = subprocess.run(
            [sys.executable, str(ROOT / "bench" / "gpu_steps.py"), "name", "--device", arguments.device],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if name.returncode:
            print(f"no device {arguments.device!r} here: {name.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 2
        arguments.out = ROOT / "bench" / "results" / re.sub(r"\W+", "_", name.stdout.strip())
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for step in STEPS:
        if step not in steps:
            continue
        left = until - time.monotonic()
        if left < 5:
            runs.append({"step": step, "seconds": 0.0, "state": "not begun: no time was left", "ok": False})
            continue
        runs.append(run_step(step, arguments, out, environment, min(STEPS[step], left)))
        result = collect(out, runs)
        if step == "smoke" and not runs[-1]["ok"]:
            print("The smoke test is broken, so the rest would mean nothing; see smoke.log")
            break
    result = collect(out, runs)
    text = table(result)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    pictures = draw(result, out)
    print("Wrote", ", ".join(str(path) for path in (out / "results.json", out / "table.md", *pictures)))
    return 0 if all(run["ok"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
