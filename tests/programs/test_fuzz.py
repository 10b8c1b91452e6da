"""What nobody should pass: see ``fuzz.py``, which also runs by itself, for longer."""

import sys

import pytest

pytest.importorskip("matplotlib", reason="the extra cli is not installed")
pytest.importorskip("resource", reason="limits of memory")

from programs.fuzz import fuzz, report


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads from /proc how much memory is in use")
def test_calls_end_in_a_result_or_a_sentence() -> None:
    found, failures = fuzz(seconds=30, seed=20261126)
    print(report(found))
    assert sum(count for key, count in found.items() if isinstance(key, tuple)) > 1000
    assert not failures, "\n\n".join(failures)
