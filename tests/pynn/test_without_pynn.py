"""Where PyNN is not installed: parameter sets can be converted, and everything else says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.marks import slow

HIDDEN = "import sys; sys.modules['pyNN'] = None\n"  # as if it were not installed


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDDEN + code, *arguments], capture_output=True, text=True, timeout=300)


def test_parameter_sets_need_no_pynn() -> None:
    done = run("import coba_triton.pynn as sim; print(sim.from_pynn({'cm': 0.25, 'tau_m': 10.0}).c_m_inv, sim.__all__)")
    assert done.stdout == "4.0 ['from_pynn', 'to_pynn']\n", done.stderr


@pytest.mark.parametrize("code", ["sim.setup()", *slow("sim.IF_cond_exp", "from coba_triton.pynn import Population")])
def test_everything_else_says_what_to_install(code: str) -> None:
    done = run(f"import coba_triton.pynn as sim\n{code}")
    assert done.returncode == 1
    assert "needs PyNN, which is not installed; pip install 'coba-triton[pynn]'" in done.stderr


def test_private_names_are_not_asked_for_pynn() -> None:
    done = run("import coba_triton.pynn as sim; print(hasattr(sim, '_simulator'))")
    assert done.stdout == "False\n", done.stderr


def test_the_package_itself_does_not_import_pynn() -> None:
    code = "import sys, coba_triton; print('pyNN' in sys.modules, 'coba_triton.pynn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False False\n", done.stderr
