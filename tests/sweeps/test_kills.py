"""A tenth of the kills, and each guard switched off: the sweep must notice."""

import pytest

from tests.sweeps.kills import sweep


@pytest.mark.slow
def test_a_tenth() -> None:
    report = sweep(30, seed=10)
    assert report.wrong == []
    assert report.hits.total() == 30


@pytest.mark.slow
@pytest.mark.parametrize("guard", ["objects_under_a_temporary_name", "workers_die_with_their_parent", "leftovers_collected"])
def test_the_sweep_fails_without(guard: str) -> None:
    assert sweep(15, 3, guard, first=True).wrong
