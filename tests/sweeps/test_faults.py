"""A tenth of the faults of disks and frameworks, and the guards that only they test, switched off."""

import os
import random
import shutil
import subprocess

import pytest

from tests.sweeps.faults import CASES, MISBEHAVIOUR, Case, sweep


def _may_mount() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(
    not os.environ.get("CI") and not _may_mount(), reason="this user may not mount file systems; run as root"
)


def test_a_tenth() -> None:
    chosen = random.Random(os.environ.get("EDGEBUILD_SEED", "1")).sample(CASES, len(CASES) // 10)
    assert not [(str(case), problems) for case, problems in sweep(chosen, jobs=2) if problems]


@pytest.mark.parametrize("text", ["!elsewhere", "!elsewhere-later"])
def test_what_is_written_over_is_never_served(text: str) -> None:
    assert not [problems for _, problems in sweep([Case(kind="worker", value=text)], jobs=1) if problems]


@pytest.mark.parametrize(
    ("guard", "text"),
    [("hits_verified", "!elsewhere"), ("inputs_held_against_receipts", "!elsewhere-later"), ("groups_killed", "!child")],
)
def test_a_fault_is_missed_without(guard: str, text: str) -> None:
    assert text in MISBEHAVIOUR
    assert [problems for _, problems in sweep([Case(kind="worker", value=text)], jobs=1, guard=guard) if problems]
