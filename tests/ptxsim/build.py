"""Compile the engine and translated kernels with the host's C++ compiler, with a cache on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    path = Path(base) / "ptxsim" if base else Path(tempfile.gettempdir()) / f"ptxsim-{os.getuid()}"
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def compiler() -> tuple[str, str]:
    """The C++ compiler's name and version.

    Raises:
        RuntimeError: if there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            version = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
            return name, version
    raise RuntimeError("ptxsim needs a C++20 compiler: install g++ or set CXX")


def flags(optimise: str) -> list[str]:
    out = ["-std=c++20", optimise, "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", f"-I{HERE}"]
    if platform.machine() in ("x86_64", "AMD64"):
        out += ["-mfma", "-mf16c"]
    return out


def digest(source: str, optimise: str) -> str:
    """Of C++ text and everything else that decides what it is compiled to."""
    header = (HERE / "runtime.h").read_text()
    key = "\0".join([source, header, compiler()[1], " ".join(flags(optimise)[:-1]), platform.machine()])
    return hashlib.sha256(key.encode()).hexdigest()[:24]


@functools.cache
def precompiled_header(optimise: str) -> Path:
    """A folder with ``runtime.h`` as g++ has read it, which takes half as long as to compile a small kernel.

    Another compiler, or g++ with other flags, finds nothing there that it can use, and reads ``runtime.h`` itself.
    """
    folder = cache_dir() / f"{digest('', optimise)}.header"
    if not (folder / "runtime.h.gch").exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
            out = Path(work) / "runtime.h.gch"
            command = [compiler()[0], *flags(optimise), "-x", "c++-header", str(HERE / "runtime.h"), "-o", str(out)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                os.replace(out, folder / out.name)
    return folder


def compile_source(source: str, optimise: str) -> Path:
    """Compile C++ text to a shared library; returns its path."""
    name = compiler()[0]
    options = [f"-I{precompiled_header(optimise)}", *flags(optimise)]
    stem = digest(source, optimise)
    library = cache_dir() / f"{stem}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
            text = Path(work) / "kernel.cpp"
            text.write_text(source)
            out = Path(work) / "kernel.so"
            done = subprocess.run([name, *options, str(text), "-o", str(out)], capture_output=True, text=True)
            if done.returncode:
                kept = cache_dir() / f"{stem}.failed.cpp"
                kept.write_text(source)
                raise RuntimeError(f"the C++ compiler failed on {kept}:\n{done.stderr[:4000]}")
            os.replace(text, cache_dir() / f"{stem}.cpp")
            os.replace(out, library)
    return library


@functools.cache
def engine() -> ctypes.CDLL:
    """The run-time library; kernels find its functions through the global symbol table."""
    path = compile_source((HERE / "runtime.cpp").read_text(), "-O2")
    lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    lib.ptxsim_findings.restype = ctypes.c_char_p
    lib.ptxsim_printed.restype = ctypes.c_char_p
    return lib


@functools.cache
def load(source: str, optimise: str) -> ctypes.CDLL:
    engine()
    return ctypes.CDLL(str(compile_source(source, optimise)))
