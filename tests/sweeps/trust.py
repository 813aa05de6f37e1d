"""What edgebuild does not take on trust, each as a function that makes it do so in this process: negative controls.

python -m tests.sweeps.trust GUARD [WORDS]      # `edgebuild WORDS` with that guard switched off
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from edgebuild import artifact, memo, noop, process, project, run, tasks
from edgebuild.memo import Memo
from edgebuild.run import Builder
from edgebuild.store import Store
from tests.sweeps.guards import leftovers_collected, outputs_held_against_their_receipt


def hits_verified_by_digest() -> None:
    def listing(self: Store, tree: str) -> Any:
        return self.listing(tree) if os.path.exists(self.object(tree)) else None

    Store._intact = lambda self, sha256: os.path.exists(self.object(sha256))  # type: ignore[method-assign]
    Store._whole_listing = listing  # type: ignore[method-assign]


def a_lock_for_each_key() -> None:
    @contextmanager
    def none(self: Store, key: str) -> Iterator[None]:
        yield

    Store.lock = none  # type: ignore[method-assign]


def a_lock_for_the_project() -> None:
    tasks.Tasks.begin = lambda self, names: None  # type: ignore[method-assign]


def ctime_in_the_memo() -> None:
    def known(self: Memo, found: os.stat_result) -> str | None:
        entry = self._known.get(f"{found.st_dev}:{found.st_ino}")
        return str(entry[3]) if entry and entry[0] == found.st_mtime_ns and entry[2] == found.st_size else None

    Memo.known = known  # type: ignore[method-assign]
    ctime_in_signatures()  # else the memo is never asked about what looks untouched


def ctime_in_signatures() -> None:
    def signature_of(found: os.stat_result) -> noop.Signature:
        return [found.st_mtime_ns, found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode]

    for module in (noop, memo):
        module.signature_of = signature_of  # type: ignore[attr-defined]


def what_was_touched_is_hashed() -> None:
    Memo.holds = lambda self, path, was: True  # type: ignore[method-assign]


def inputs_looked_at_again() -> None:
    """After the step, what was looked at before it is believed still to be so."""
    look, make = Builder._inputs, Builder._make
    before: dict[str, dict[str, str]] = {}

    def inputs(self: Builder, step: Any, how: Any) -> dict[str, str]:
        return before.get(step.name) or look(self, step, how)

    def made(self: Builder, step: Any, key: str, found: Any, earlier: Any) -> Any:
        before[step.name] = found
        try:
            return make(self, step, key, found, earlier)
        finally:
            del before[step.name]

    Builder._inputs, Builder._make = inputs, made  # type: ignore[method-assign]
    run._seen = lambda step: {}


def seals_of_receipts_and_records() -> None:
    artifact._unsealed = lambda kind, sealed: json.loads(sealed)


def seals_of_the_memo_and_the_plan() -> None:
    for module in (memo, noop, project):
        module.unsealed = lambda data: data[12:-1]  # type: ignore[attr-defined]


def receipts_name_their_own_outputs() -> None:
    run._ours = lambda path, receipt: path.startswith(("build/", "dist/"))


def objects_under_a_temporary_name() -> None:
    """Written where they will lie, on a slow disk."""

    def rename_in(self: Store, path: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(path, "rb") as source, open(target, "wb") as file:
            while piece := source.read(64 * 1024):
                file.write(piece)
                file.flush()
                time.sleep(0.1)
        os.chmod(target, 0o444)
        os.unlink(path)

    Store._rename_in = rename_in  # type: ignore[method-assign]


def workers_die_with_their_parent() -> None:
    """Workers that hear of nothing, and take their time."""
    start = subprocess.Popen
    worker = "import sys, time; from edgebuild import worker; worker._die_with_parent = worker._ask_for_death = lambda: None; worker.main(sys.argv[1]); time.sleep(3)"

    def popen(words: list[str], *rest: Any, **named: Any) -> Any:
        alone = words[1:3] == ["-m", "edgebuild.worker"]
        return start([words[0], "-c", worker, *words[3:]] if alone else words, *rest, **named)

    process._dying_with_us = list  # type: ignore[assignment]
    process.subprocess = type("", (), {**vars(subprocess), "Popen": staticmethod(popen)})  # type: ignore[attr-defined]


GUARDS: Mapping[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        hits_verified_by_digest,
        a_lock_for_each_key,
        a_lock_for_the_project,
        ctime_in_the_memo,
        ctime_in_signatures,
        what_was_touched_is_hashed,
        inputs_looked_at_again,
        seals_of_receipts_and_records,
        seals_of_the_memo_and_the_plan,
        receipts_name_their_own_outputs,
        objects_under_a_temporary_name,
        workers_die_with_their_parent,
        leftovers_collected,
        outputs_held_against_their_receipt,
    )
}


def main() -> int:
    from edgebuild.cli import main as edgebuild

    GUARDS[sys.argv[1]]()
    return edgebuild(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
