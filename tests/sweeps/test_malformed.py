"""A seeded tenth of the malformed sweeps, and each of their guards switched off, which must make them fail."""

import pytest

from tests.sweeps import malformed_models, malformed_targets
from tests.sweeps.children import sweep

TARGETS, MODELS = "tests.sweeps.malformed_targets", "tests.sweeps.malformed_models"


@pytest.mark.parametrize(
    ("module", "count"),
    [(TARGETS, malformed_targets.COUNT // 10), (MODELS, malformed_models.COUNT // 10)],
    ids=["targets", "models"],
)
def test_a_tenth(module: str, count: int) -> None:
    tally = sweep(module, count, seed=1, batch=count // 2)
    assert tally.violations == []
    assert tally.cases == count
    assert tally.outcomes["refused"] > count / 2
    assert tally.outcomes["accepted"] > 0


@pytest.mark.parametrize("guard", sorted(malformed_targets.GUARDS))
def test_targets_fail_without(guard: str) -> None:
    assert _found_out(sweep(TARGETS, 300, seed=20, without=guard, batch=300).violations)


@pytest.mark.parametrize("guard", sorted(malformed_models.GUARDS))
def test_models_fail_without(guard: str) -> None:
    assert _found_out(sweep(MODELS, 600, seed=20, without=guard, batch=600).violations)


def _found_out(violations: list[str]) -> list[str]:
    """Those that are no fault of how the guard was taken out: what stands in its place lacks nothing."""
    return [one for one in violations if "AttributeError" not in one]
