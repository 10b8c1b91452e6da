"""The table of planted bugs holds for the bugs and the sources that are there."""

from __future__ import annotations

import itertools

from programs import mutants


def test_every_bug_can_be_planted() -> None:
    """Its place in the sources is still there, and what it makes of them is Python."""
    for name, mutant in mutants.MUTANTS.items():
        source = (mutants.ROOT / mutant.file).read_text()
        broken = mutant.apply(source)
        assert broken != source, name
        compile(broken, mutant.file, "exec")


def test_table_lists_every_bug_and_a_layer_that_noticed_it() -> None:
    rows = mutants.read(mutants.TABLE)
    assert rows.keys() == mutants.MUTANTS.keys(), "run `make mutants`"
    for name, row in rows.items():
        reached = mutants.AREAS[mutants.MUTANTS[name].area]
        assert [bool(verdict) for verdict in row] == [layer in reached for layer in mutants.LAYERS], name
        assert "noticed" in row, name


def test_the_tests_that_notice_are_part_of_make_test() -> None:
    """They are not marked as slow, or lie in ``compiled/``, which tests without this mark run."""
    assert '\t$(PYTEST) -m "not slow" $(ARGS)\n' in (mutants.ROOT / "Makefile").read_text()
    running = (mutants.ROOT / "tests" / "kernels" / "test_compiled.py").read_text()
    for unmarked in (
        "\n\n\ndef test_kernels(",
        "\n\n\ndef test_ragged_programs(",
        '("arch", [80, *slow(90)])\ndef test_sparse_kernels(',
    ):
        assert unmarked in running
    for name, layers in mutants.AREAS.items():
        for layer, arguments in layers.items():
            if layer == "executed":
                (file,) = (argument for argument in arguments if argument.startswith("tests/"))
                assert file in ("tests/compiled/test_kernels.py", "tests/compiled/test_sparse_kernels.py"), name
                assert arguments[1:4] == ["ptxsim", "--arch", "80"], name
            else:
                assert ("-m", "not slow") in itertools.pairwise(arguments), (name, layer)


def test_the_page_on_tests_counts_the_bugs() -> None:
    rows = mutants.read(mutants.TABLE).values()
    alone = sum(row.count("noticed") == 1 and row[list(mutants.LAYERS).index("executed")] == "noticed" for row in rows)
    page = (mutants.ROOT / "docs" / "testing.md").read_text()
    assert f"plants {len(rows)} bugs" in page and f"Of these, {alone} are noticed by the executed code alone" in page
