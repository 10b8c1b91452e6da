"""Print the times of pytest-benchmark as a table in Markdown: python bench/table.py comparison.json"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

BASELINE = "norse, unbind"


def table(report: dict[str, Any]) -> str:
    """A row for each case and contender. Ratios are relative to norse's loop, or to the reference if norse was absent."""
    machine, first = report["machine_info"], report["benchmarks"][0]["extra_info"]
    lines = [
        f"{machine['cpu'].get('brand_raw', machine['processor'])}, torch {first['torch']}, {first['threads']} threads; "
        "median ± half the range between the quartiles, times faster than the baseline, peak memory beyond what was there.",
        "",
        "| case | | time per step | | ns per neuron-step | peak memory, bytes per neuron-step |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for group, rows in itertools.groupby(report["benchmarks"], key=lambda row: row["group"]):
        measured = {row["params"]["name"]: row for row in rows}
        baseline = measured.get(BASELINE) or measured["reference"]
        for name, row in measured.items():
            info, stats = row["extra_info"], row["stats"]
            memory = "" if info["peak_bytes"] is None else f"{info['peak_bytes'] / info['neuron_steps']:.2f}"
            rate = f"{group}, {info['rate']:.1%} spikes" if name == "reference" else ""
            step = 1e6 / info["steps"]
            lines.append(
                f"| {rate} | {name} | {step * stats['median']:.1f} ± {step * stats['iqr'] / 2:.1f} us "
                f"| x{baseline['stats']['median'] / stats['median']:.1f} "
                f"| {1e9 * stats['median'] / info['neuron_steps']:.2f} | {memory} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    print(table(json.loads(parser.parse_args().report.read_text())))
