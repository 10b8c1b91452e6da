"""What ``import coba_triton`` brings: all public names and what PyTorch must know, but no PyTorch to who asks for help."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coba_triton
from coba_triton.cli.tools import COMMANDS

STARTS = {
    "package": ["-m", "coba_triton"],
    "module": ["-m", "coba_triton.cli"],
    "script": [str(Path(sys.executable).with_name("coba-triton"))],
}


def imported(*command: str) -> set[str]:
    """The modules that a command of Python imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--version"]], ids=lambda given: "".join(given) or "none")
def test_help_imports_no_pytorch(start: str, arguments: list[str]) -> None:
    if start == "script" and not Path(STARTS[start][0]).is_file():
        pytest.skip("the command is not installed beside Python")
    found = imported(*STARTS[start], *arguments)
    assert "coba_triton.cli.app" in found
    assert not found & {"torch", "numpy", "numba"}


@pytest.mark.parametrize("command", ["simulate", "plot", *COMMANDS])
def test_help_of_a_command_imports_no_pytorch(command: str) -> None:
    found = imported("-m", "coba_triton", command, "--help")
    assert "coba_triton.cli.app" in found
    assert not found & {"torch", "numpy", "numba"}


def test_a_command_imports_pytorch() -> None:
    """So the tests above would notice it."""
    assert "torch" in imported("-m", "coba_triton", "info")


def test_the_command_line_has_every_public_name() -> None:
    """Each is there when it is asked for, and the whole package with the first."""
    code = """if True:
        import sys
        sys.argv[0] = "/usr/bin/coba-triton"
        import coba_triton
        assert "torch" not in sys.modules and "__version__" in vars(coba_triton)
        assert not hasattr(coba_triton, "CobaLIP")
        assert coba_triton.simulate is sys.modules["coba_triton.stream.simulation"].simulate
        from coba_triton import *
        print(*sorted(name for name in coba_triton.__all__ if name in globals()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(coba_triton.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import coba_triton, torch", "import torch, coba_triton"])
def test_an_import_is_enough_to_read_files(imports: str, tmp_path: Path) -> None:
    """Records from ``torch.load`` and operators of an exported program are known, though no public name was asked for."""
    torch.save({"p": coba_triton.CobaLIFParameters(tau_syn_exc_inv=0.25)}, tmp_path / "record.pt")
    layer = coba_triton.CobaLIF(dt=0.1, return_state=False)
    torch.export.save(torch.export.export(layer, (torch.zeros(3, 2),)), tmp_path / "program.pt2")
    code = f"""if True:
        import warnings
        {imports}
        print(torch.load({str(tmp_path / "record.pt")!r}, weights_only=True)["p"].tau_syn_exc_inv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load({str(tmp_path / "program.pt2")!r})
        print(*program.module()(torch.zeros(3, 2)).shape)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.25", "3", "2"]


def test_who_is_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.common.signals import is_command_line

    for argv, original, expected in (
        (["-m", "info"], ["python", "-u", "-m", "coba_triton", "info"], True),
        (["/x/coba_triton/cli/__main__.py"], ["python", "-m", "coba_triton.cli"], True),
        (["/bin/coba-triton", "info"], ["python", "/bin/coba-triton", "info"], True),
        (["-m", "script.py", "coba_triton"], ["python", "-m", "coba_triton.pynn", "script.py", "coba_triton"], False),
        (["train.py", "coba_triton"], ["python", "train.py", "coba_triton"], False),
        ([""], ["python"], False),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", original)
        assert is_command_line() is expected, argv
