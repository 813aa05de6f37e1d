"""A tenth of the sweep over system calls, and each guard switched off: then the sweep must find what it guards against."""

import os
import random
import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.sweeps.syscalls import PARTS, Point, Sweep

SHARE = 10
MOST = 24  # points, so that a slow machine is done in time
pytestmark = pytest.mark.skipif(
    not shutil.which("strace") and not os.environ.get("CI"), reason="strace is not installed (Debian: apt-get install strace)"
)

Choose = Callable[[Point], bool]


@pytest.fixture(scope="module")
def sweep() -> Iterator[Sweep]:
    made = Sweep(PARTS, jobs=2)
    yield made
    made.close()


def test_a_tenth(sweep: Sweep) -> None:
    chosen = random.Random(os.environ.get("EDGEBUILD_SEED", "1")).sample(sweep.points, min(MOST, len(sweep.points) // SHARE))
    found = [(str(point), problems) for point, problems in sweep.run(chosen)]
    assert not [(point, problems) for point, problems in found if problems]
    assert sum(problems is None for _, problems in found) <= len(found) // 10  # each call did come


def test_what_is_stored_is_on_the_disk_before_it_has_its_name(sweep: Sweep) -> None:
    assert not sweep.unsynced()
    assert sum(call.name == "fsync" for call in sweep.known["build"].calls) >= 40


def at(error: str, name: str, *words: str) -> Choose:
    """Points of this error at calls of this name, on paths with all of these words."""
    return lambda point: point.error == error and point.call.name == name and all(word in point.call.path for word in words)


CONTROLS = {
    "objects_under_a_temporary_name": ("build", at("KILL", "sendfile", "/objects/")),
    "receipts_under_a_temporary_name": ("build", at("KILL", "write", "/build/one/", ".json")),
    "outputs_under_a_temporary_name": ("build", at("KILL", "sendfile", "/dist/one/")),
    "folders_removed_under_a_temporary_name": ("build", at("KILL", "unlink", "/dist/one/manifest")),
    "objects_before_their_record": ("build", at("KILL", "fsync", "/objects/")),
    "outputs_before_their_receipt": ("build", at("KILL", "rename", "/convert/model")),
    "receipts_list_what_is_to_come": ("targets", at("KILL", "rename", "/build/three/package.json")),
    "outputs_held_against_their_receipt": ("build", at("KILL", "rename", "/build/one/", ".json")),
    "leftovers_collected": ("build", at("KILL", "fsync", "/tmp/")),
    "scratch_removed": ("build", at("EIO", "fsync", "/tmp/")),
    "errors_of_fsync_heard": ("build", at("EIO", "fsync", "/tmp/")),
    "errors_in_one_line": ("build", at("ENOSPC", "write", "/tmp/")),
}


@pytest.mark.parametrize("guard", CONTROLS)
def test_the_sweep_fails_without(guard: str) -> None:
    part, chosen = CONTROLS[guard]
    sweep = Sweep([part], jobs=1, guard=guard)
    try:
        found = [(str(point), problems) for point, problems in sweep.run([one for one in sweep.points if chosen(one)][:12])]
        assert any(problems for _, problems in found), found
    finally:
        sweep.close()


def test_the_sweep_fails_without_fsync() -> None:
    sweep = Sweep(["build"], jobs=1, guard="fsync_called")
    sweep.close()
    assert sweep.unsynced()
