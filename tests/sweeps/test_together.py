"""A tenth of the builds at once, and each guard switched off: the sweep must notice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebuild.run import Builder
from tests.conftest import Lab, make_lab
from tests.sweeps.audit import contents
from tests.sweeps.together import sweep, write
from tests.sweeps.trust import inputs_looked_at_again


def test_a_tenth() -> None:
    report = sweep(7, seed=10)
    assert report.wrong == []
    assert report.kills > 0
    assert report.performed > 0


@pytest.mark.parametrize(
    ("guard", "kind"), [("a_lock_for_each_key", "two"), ("a_lock_for_the_project", "an edit, and a second terminal")]
)
def test_the_sweep_fails_without(guard: str, kind: str) -> None:
    assert sweep(5, 1, guard, (kind,), first=True).wrong


def edited_under_the_work(lab: Lab) -> None:
    """Between the moment when convert's key is known and its work, the model is another one; then it is as before."""
    count, done = lab._counted, []

    def perform(record: Mapping[str, Any], *rest: Any) -> Any:
        if record["verb"] == "convert" and not done:
            done.append(1)
            write(lab.root, ("y", 32))
        return count(record, *rest)

    lab._counted = perform  # type: ignore[method-assign]
    write(lab.root, ("x", 32))
    lab.build()
    write(lab.root, ("x", 32))
    lab.build()


def test_an_edit_between_key_and_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, guarded, lax = (make_lab(tmp_path / name) for name in ("clean", "guarded", "lax"))
    write(clean.root, ("x", 32))
    clean.build()
    edited_under_the_work(guarded)
    assert contents(guarded.root) == contents(clean.root)
    for name in ("_inputs", "_make"):
        monkeypatch.setattr(Builder, name, getattr(Builder, name))  # so that they are as before when this ends
    inputs_looked_at_again()
    edited_under_the_work(lax)
    assert contents(lax.root) != contents(clean.root)
