"""The package as it is built, installed and imported: every way to get it must give the same modules."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
KERNELS_LINK = "coba_triton/kernels"
# what a tree without git holds beside its sources; the same names as in .gitignore
BY_PRODUCTS = {".git", ".venv", "venv", "build", "dist", "site", "out", "__pycache__", ".benchmarks", "htmlcov"}
# what only the extras bring
OPTIONAL = {
    "triton",
    "typer",
    "rich",
    "matplotlib",
    "pydantic",
    "pint",
    "zarr",
    "xxhash",
    "neo",
    "pyNN",
    "quantities",
}
LINKS = ["symlink", "text", "missing"]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its end, outside this process's import settings, and return what it printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=cwd, env=clean | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def git_files(*options: str) -> set[str] | None:
    """What ``git ls-files`` lists, or None where the tree is no git checkout of its own."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.split("\0")) - {""} if done.returncode == 0 else None


def tree_files() -> set[str]:
    """The sources: all that git tracks or would add; without git, all that is no by-product."""
    listed = git_files("--cached", "--others", "--exclude-standard")
    if listed is not None:
        return {name for name in listed if os.path.lexists(ROOT / name)}
    found = set()
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [
            name for name in folders if name not in BY_PRODUCTS | set(links) and not name.endswith(("_cache", ".egg-info"))
        ]
        found |= {(here / name).relative_to(ROOT).as_posix() for name in [*files, *links]}
    return found


def set_link(tree: Path, link: str) -> None:
    """Leave ``coba_triton/kernels`` as a symlink, as a text file (git on Windows, pip), or missing."""
    path = tree / KERNELS_LINK
    path.unlink(missing_ok=True)
    if link == "symlink":
        path.symlink_to("../kernels", target_is_directory=True)
    elif link == "text":
        path.write_text("../kernels", "utf-8")


def contents(wheel: Path) -> dict[str, int]:
    """The files of a wheel with their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def build(kind: str, tree: Path, folder: Path) -> Path:
    """Build the ``sdist`` or the ``wheel`` of a tree, with the build backend of this environment."""
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, tree)
    run(*command, cwd=tree.parent)
    return only(folder, "*")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clean copy of the sources."""
    copy = tmp_path / "tree"
    for name in tree_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    set_link(copy, "symlink")
    return copy


@pytest.fixture
def sdist(tree: Path, tmp_path: Path) -> Path:
    return build("sdist", tree, tmp_path / "sdist")


@pytest.fixture
def wheel(tree: Path, tmp_path: Path) -> Path:
    return build("wheel", tree, tmp_path / "wheel")


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that borrows this one's dependencies, but not its coba_triton.

    Folders named in a ``.pth`` file come last on the path, and the ``.pth`` files inside them are not read:
    an editable install's is not.
    """
    home = tmp_path / "env"
    venv.create(home, symlinks=os.name != "nt")
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(home)})
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    borrowed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed), "utf-8")
    return Path(scripts) / ("python.exe" if os.name == "nt" else "python")


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", *offline, *what, cwd=cwd)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(contents(wheel))
    top = {PurePosixPath(name).parts[0] for name in names}
    assert top == {"coba_triton", f"coba_triton-{PROJECT['version']}.dist-info"}
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        tags = archive.read(f"coba_triton-{PROJECT['version']}.dist-info/WHEEL").decode().splitlines()
    assert "Root-Is-Purelib: true" in tags

    sources = {name for name in tree_files() if PurePosixPath(name).suffix in {".py", ".toml", ".typed", ".npz", ".txt"}}
    package = {name for name in sources if name.startswith("coba_triton/")}
    kernels = {f"coba_triton/{name}" for name in sources if name.startswith("kernels/")}
    assert {"coba_triton/py.typed", "coba_triton/kernels/neuron.py"} <= package | kernels
    assert any(name.startswith("coba_triton/configs/") for name in package)
    assert {name for name in names if name.startswith("coba_triton/")} == package | kernels


def test_sdist_holds_every_file_of_the_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    packed = {PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix() for member in members}
    tracked = git_files()
    missing = (tree_files() if tracked is None else tracked & tree_files()) - packed - {KERNELS_LINK}
    assert not missing, "name them in MANIFEST.in"


def test_wheel_from_sdist_is_the_wheel_from_the_tree(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = only(tmp_path / "unpacked", "*")
    assert contents(build("wheel", unpacked, tmp_path / "again")) == contents(wheel)


@pytest.mark.slow
@pytest.mark.parametrize("link", ["symlink", "followed", "missing"])
def test_wheel_from_zip_is_the_wheel_from_the_tree(tree: Path, wheel: Path, tmp_path: Path, link: str) -> None:
    """Zips store the link as one (pip unpacks it as a text file), as a copy of its target, or not at all."""
    archive_path = tmp_path / "coba_triton-main.zip"
    with zipfile.ZipFile(archive_path, "w") as archive:
        for name in sorted(tree_files() - {KERNELS_LINK}):
            archive.write(tree / name, f"coba_triton-main/{name}")
        if link == "symlink":
            info = zipfile.ZipInfo(f"coba_triton-main/{KERNELS_LINK}")
            info.create_system = 3
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "../kernels")
        elif link == "followed":
            for path in (tree / "kernels").glob("*.py"):
                archive.write(path, f"coba_triton-main/{KERNELS_LINK}/{path.name}")
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation")
    run(*command, "-w", tmp_path / "zipped", archive_path, cwd=tmp_path)
    assert contents(only(tmp_path / "zipped", "*.whl")) == contents(wheel)


LOCATE = """
import importlib.util, coba_triton

print(coba_triton.__file__)
print(coba_triton.__version__)
print(importlib.util.find_spec("coba_triton.kernels.neuron").origin)
print(getattr(importlib.util.find_spec("kernels"), "submodule_search_locations", None))
"""


@pytest.mark.slow
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("how", ["bare", "editable"])
def test_kernels_are_found_in_a_checkout(tree: Path, tmp_path: Path, fresh_python: Path, how: str, link: str) -> None:
    set_link(tree, link)
    if how == "editable":
        install(fresh_python, "-e", tree, cwd=tmp_path)
    where = tree if how == "bare" else tmp_path
    package, _, step, _ = run(fresh_python, "-c", LOCATE, cwd=where).splitlines()
    assert os.path.samefile(package, tree / "coba_triton" / "__init__.py")
    assert os.path.samefile(step, tree / "kernels" / "neuron.py")


COMPILE = """
from compile_targets import compile_specimen

kernel = compile_specimen()
assert ".target sm_80" in kernel.asm["ptx"]
"""


@pytest.mark.slow
def test_installed_wheel_imports_and_compiles(wheel: Path, tmp_path: Path, fresh_python: Path) -> None:
    """In a new environment, far from the checkout, a kernel of the installed package compiles for sm_80."""
    install(fresh_python, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    home = fresh_python.parents[1]

    package, version, step, top_level = run(fresh_python, "-c", LOCATE, cwd=elsewhere).splitlines()
    assert Path(package).is_relative_to(home)
    assert Path(step).is_relative_to(home)
    assert version == PROJECT["version"]
    assert str(home) not in top_level
    assert "coba-triton" in run(fresh_python.with_name("coba-triton"), "--help", cwd=elsewhere)

    if importlib.util.find_spec("triton"):
        shutil.copy(ROOT / "tests" / "programs" / "compile_targets.py", elsewhere)
        run(fresh_python, "-c", COMPILE, cwd=elsewhere, env={"TRITON_CACHE_DIR": str(tmp_path / "cache")})


# the packages that are named are not there: they are not found, and cannot be imported
HIDE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

HIDDEN = set(sys.argv[1:])
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
for name in HIDDEN & set(sys.modules):
    del sys.modules[name]
"""

USE = """
import coba_triton, torch

x = torch.full((40, 2, 70), 0.05, requires_grad=True)
for backend in ("cpu", "auto", "reference"):
    spikes, state = coba_triton.coba_lif_feed_forward_integral(x, None, dt=0.1, backend=backend)
    spikes.sum().backward()
assert spikes.any() and state.v.shape == (2, 70)
network = coba_triton.CobaLIFRecurrent(70, 20, dt=0.1, backend="cpu")
network(x)[0].sum().backward()
source = coba_triton.PoissonSource(100.0, 1000, (5,), dt=0.1, weight=1.0)
assert coba_triton.simulate(coba_triton.CobaLIF(dt=0.1), source, progress=False).rates(10.0)[1].mean() > 0
try:
    coba_triton.coba_lif_feed_forward_integral(x, None, backend="triton")
except RuntimeError as error:
    assert "needs the triton package, which is not installed; install coba-triton[interp]" in str(error)
else:
    raise AssertionError("ran without Triton")
"""

# After the packages of others, which choose by platform when they are imported, what Windows does not have goes away.
WITHOUT_POSIX = """
import builtins, ctypes, importlib, mmap, os, pkgutil, signal, sys
import filelock, matplotlib.figure, numba, pydantic, pint, rich.progress, torch, typer, zarr

out = sys.argv.pop(1)
for module, names in {
    os: ("fork", "getpgid", "getuid", "killpg", "setsid", "sysconf", "uname"),
    signal: ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1"),
    mmap: [name for name in dir(mmap) if name.startswith("MADV_")],
}.items():
    for name in names:
        delattr(module, name)
open_, load = builtins.open, ctypes.CDLL

def opened(file, *args, **options):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(file)
    return open_(file, *args, **options)

def loaded(name, *args, **options):
    if name is None:
        raise TypeError("bad argument type")
    return load(name, *args, **options)

builtins.open, ctypes.CDLL = opened, loaded
"""

USE_ALL = """
import importlib, pkgutil
from coba_triton.cli import main

for module in pkgutil.walk_packages(coba_triton.__path__, "coba_triton."):
    alone = ".backend.triton" in module.name or module.name.endswith((".__main__", ".compiler"))
    if not alone and ".kernels" not in module.name and ".pynn." not in module.name:  # those need a compiler, and PyNN
        importlib.import_module(module.name)
for sink in (out + "/run.zarr", out + "/run.npz"):
    coba_triton.simulate(coba_triton.CobaLIF(dt=0.1), source, sink=sink, progress=False)
    assert coba_triton.open_result(sink).steps == 1000
assert main(["simulate", "poisson", "--out", out + "/poisson"]) == 0
assert main(["info"]) == 0
assert main(["check", "--device", "cpu", "--only", "determinism"]) == 0
"""


def test_import_leaves_optional_packages_alone() -> None:
    loaded = run(sys.executable, "-c", "import coba_triton, sys; print(*sys.modules)", cwd=ROOT).split()
    assert "coba_triton" in loaded
    assert not (OPTIONAL | {"numba"}) & set(loaded)  # numba is there, but takes its time


def test_package_works_where_optional_packages_are_missing() -> None:
    run(sys.executable, "-c", HIDE + USE, *OPTIONAL, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a machine that lacks these things needs no imitation")
def test_package_works_without_what_only_posix_has(tmp_path: Path) -> None:
    posix = ("triton", "fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
    run(sys.executable, "-c", WITHOUT_POSIX + HIDE + USE + USE_ALL, tmp_path, *posix, cwd=ROOT)


def test_python_versions_agree() -> None:
    """What the index shows, what pip and make ask for, what the tools check, and what the documentation calls tested."""
    first, *others = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={first}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    assert tools["mypy"]["python_version"] == first
    assert tools["ruff"]["target-version"] == "py" + first.replace(".", "")
    makefile, page = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "docs/install.md"))
    assert set(re.findall(r"Python (3\.\d+)", makefile)) == {first}
    platforms = page.partition("## Platforms")[2].partition("##")[0]
    assert set(re.findall(r"\b3\.1\d\b", platforms)) == {first, *others}


def test_citation_names_the_version() -> None:
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert citation is not None
    assert citation[1] == PROJECT["version"]
