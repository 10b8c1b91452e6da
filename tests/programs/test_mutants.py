"""The table of planted bugs holds for the bugs and the sources that are there."""

from __future__ import annotations

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
