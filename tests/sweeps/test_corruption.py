"""A tenth of the corruptions, and each guard switched off: the sweep must notice."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.sweeps.corruption import sweep


def test_a_tenth() -> None:
    assert sweep(30, seed=10).wrong == []


@pytest.mark.parametrize(
    ("guard", "victim", "damage"),
    [
        ("hits_verified_by_digest", "object", "flip apart"),
        ("outputs_held_against_their_receipt", "output", "flip"),
        ("ctime_in_the_memo", "output", "flip unseen"),
        ("ctime_in_signatures", "output", "flip unseen"),
        ("what_was_touched_is_hashed", "output", "flip unseen"),
        ("seals_of_receipts_and_records", "record", "another meaning"),
        ("seals_of_receipts_and_records", "receipt", "another meaning"),
        ("seals_of_the_memo_and_the_plan", "memo", "another meaning"),
        ("seals_of_the_memo_and_the_plan", "plan", "another meaning"),
        ("receipts_name_their_own_outputs", "receipt", "swap"),
    ],
)
def test_the_sweep_fails_without(guard: str, victim: str, damage: str) -> None:
    words = ["--without", guard, "--only", victim, "--by", damage, "--count", "60"]
    ended = subprocess.run([sys.executable, "-m", "tests.sweeps.corruption", *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert " is " in ended.stdout or victim == "plan"  # what was served is wrong; a plan that says something else may only crash
