"""What an import leaves behind."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from coba_triton.common.garbage import importing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    code = f"import gc; gc.{'enable' if enabled else 'disable'}(); import coba_triton; print(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == f"{enabled}\n", done.stderr


def test_what_an_import_made_is_not_looked_at_by_the_next_collection() -> None:
    with importing():
        made: list[object] = [[number] for number in range(100)]
    young = {id(thing) for thing in gc.get_objects(generation=0)}
    assert not young & {id(thing) for thing in made}
    old = {id(thing) for thing in gc.get_objects(generation=2)}
    assert old >= {id(thing) for thing in made}


def test_what_was_frozen_stays_so() -> None:
    code = """if True:
        import gc
        from coba_triton.common.garbage import importing
        gc.freeze()
        before = gc.get_freeze_count()
        with importing():
            pass
        print(gc.get_freeze_count() == before > 0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n", done.stderr
