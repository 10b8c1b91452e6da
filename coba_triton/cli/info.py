"""``coba-triton info``: which packages and devices there are, which backend serves each device, and which tables it uses."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import torch
from rich.table import Table

import coba_triton
from coba_triton.backend.choose import BACKENDS, choose_backend
from coba_triton.common.files import is_there
from coba_triton.common.versions import driver_version, package_version
from coba_triton.tuning import tables

from .output import say

PACKAGES = ("torch", "triton", "numba", "numpy", "norse")


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the packages it works with; None for what is not installed."""
    return {
        "coba_triton": coba_triton.__version__,
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "torch's CUDA": torch.version.cuda,
        "torch's HIP": torch.version.hip,
        "GPU driver": driver_version(),
    }


def devices() -> list[dict[str, Any]]:
    """The processor and every accelerator that PyTorch sees."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": tables.cpu_name(),
            "arch": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            properties = module.get_device_properties(index)
            if torch.version.hip:
                arch = str(properties.gcnArchName).split(":")[0]
            else:
                arch = "sm_{}{}".format(*module.get_device_capability(index)) if kind == "cuda" else kind
            found.append(
                {
                    "device": f"{kind}:{index}",
                    "name": properties.name,
                    "arch": arch,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "multiprocessors": getattr(properties, "multi_processor_count", None),
                }
            )
    return found


def serving(device: str) -> list[dict[str, Any]]:
    """For every backend, whether it serves a device, and if not, why."""
    rows: list[dict[str, Any]] = []
    for backend in BACKENDS:
        try:
            used = choose_backend(backend, torch.device(device))
        except RuntimeError as error:
            rows.append({"backend": backend, "serves": False, "reason": str(error)})
        else:
            rows.append({"backend": backend, "serves": True, "uses": used})
    return rows


def caches() -> dict[str, str]:
    """The folders in which compiled kernels are kept."""
    from coba_triton.backend.cpu.feed_forward import forward_kernel

    folder = forward_kernel().stats.cache_path
    found = {"numba": folder or "nowhere, as no folder can be written to; name one in NUMBA_CACHE_DIR"}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = str(triton.knobs.cache.dir)
    return found


def tuning_tables(device: str) -> list[dict[str, Any]]:
    """The tables that launches look into, in their order, for every backend with tables that serves a device."""
    found = []
    for row in serving(device):
        if row["backend"] in ("auto", "reference") or not row["serves"]:
            continue
        target = tables.machine(row["uses"], torch.device(device))
        for path in tables.sources(target.name):
            entry = {"backend": target.backend, "arch": target.arch, "path": str(path), "state": "not there", "entries": 0}
            if is_there(path):
                try:
                    entry |= {"state": "used", "entries": len(tables.entries_for(tables.read_table(path), target))}
                except tables.TableError as error:
                    entry["state"] = f"ignored: it {error}"
            found.append(entry)
    return found


def collect() -> dict[str, Any]:
    """Everything that ``coba-triton info`` says, as plain JSON."""
    present = devices()
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": present,
        "backends": {device["device"]: serving(device["device"]) for device in present},
        "interpreter": os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        "caches": caches(),
        "tuning": {device["device"]: tuning_tables(device["device"]) for device in present},
    }


def run(as_json: bool) -> None:
    """Print what :func:`collect` found."""
    found = collect()
    if as_json:
        say(json.dumps(found, indent=2))
        return
    for title, rows in _sections(found):
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for row in rows:
            table.add_row(*row)
        say(table, "")


def _sections(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    sections: list[tuple[str, list[tuple[str, ...]]]] = [
        ("Versions", [(name, value or "-") for name, value in found["versions"].items()] + [("platform", found["platform"])])
    ]
    for device in found["devices"]:
        name = device["device"]
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        rows: list[tuple[str, ...]] = [("", details)]
        for row in found["backends"][name]:
            uses = "" if row.get("uses") == row["backend"] else f", uses {row.get('uses')}"
            rows.append((row["backend"], f"yes{uses}" if row["serves"] else f"no: {row['reason']}"))
        for table in found["tuning"][name]:
            entries = f", {table['entries']} entries" if table["entries"] else ""
            rows.append((f"tuning, {table['backend']}", f"{table['path']} ({table['state']}{entries})"))
        if not found["tuning"][name]:
            rows.append(("tuning", f"no table is looked into ({tables.VARIABLE}=off)"))
        sections.append((f"{name}: {device['name']}", rows))
    if not any(device["device"] != "cpu" for device in found["devices"]):
        sections.append(("GPU", [("", "none that PyTorch sees; the CPU path serves every function")]))
    sections.append(("Caches of compiled kernels", list(found["caches"].items())))
    return sections
