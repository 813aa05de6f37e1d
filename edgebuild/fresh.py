"""Is this step's receipt still true? The whole truth about a step, in one pure-reading function that everything asks.

The verdict over all default targets is remembered with the signature of every path that it was read from: while none of
them moves, nothing is read again. That is what makes a no-op as quick as a few thousand stats.
"""

import json
import time
from collections.abc import Iterable

from edgebuild.artifact import Artifact, Receipt, Record, receipt_from_bytes
from edgebuild.files import read_whole, sealed, write_whole
from edgebuild.noop import NOTE, TICK, racy, recall, signature
from edgebuild.project import Project
from edgebuild.step import SOURCES, Step


class Fresh:
    """`fresh(step)`, memoised within a run; `ran` tells it what ran meanwhile.

    `again` names steps that are to run once more whatever is known of them: they are not fresh until they have. `anew`: what
    an earlier run remembered is not asked.
    """

    def __init__(self, project: Project, again: Iterable[str] = (), anew: bool = False) -> None:
        self._project = project
        self._known: dict[str, bool] = {}
        self.again = set(again)
        self.changed = 0  # ns: when a step was last made true
        self.remembered = not anew and not self.again and recall(project.identity()) is not None
        if self.remembered:
            self._known = {step.name: True for step in _remembered(project)}

    def __call__(self, step: Step) -> bool:
        """The steps before it are fresh, it last ran under the key that it has now, and what it made is intact."""
        if step.name in self.again:
            return False
        known = self._known.get(step.name)
        if known is None:
            known = self._known[step.name] = self._judge(step)
        return known

    def ran(self, step: Step, refused: bool) -> None:
        """A step was made true, or refused: the verdicts of all that follow it may be other ones now."""
        self.remembered, self.changed = False, time.time_ns()
        self.again.discard(step.name)
        for one in self._project.behind(step):
            self._known.pop(one.name, None)
        self._known[step.name] = not refused

    def known(self, step: Step) -> bool:
        """Whether it is remembered to be fresh, and nothing has run since."""
        return self.remembered and self._known.get(step.name, False)

    def _judge(self, step: Step) -> bool:
        if not all(self(self._project.steps[name]) for name in step.after):
            return False
        receipt = read_receipt(step.receipt)
        if receipt is None or receipt.refused or receipt.outputs.keys() != step.outputs.keys():
            return False
        memo = self._project.memo
        try:
            if receipt.key != key_now(self._project, step):
                return False
            return all(path == step.outputs[name] and memo.of(path) == digest for name, (path, digest) in receipt.outputs.items())
        except OSError:
            return False


def key_now(project: Project, step: Step) -> str:
    """The key of a step as its inputs are. Raises OSError where one cannot be read."""
    memo = project.memo
    return step.key({role: memo.of(path) for role, path in step.inputs.items()})


def stored(project: Project, step: Step, key: str) -> Record | None:
    """The record of this key, where everything that the step needs of it is still to be had, whole."""
    record = project.store.record(key)
    if record is None or not step.outputs.keys() <= record.outputs.keys():
        return None
    return record if all(_to_be_had(project, path, record.outputs[name]) for name, path in step.outputs.items()) else None


def _to_be_had(project: Project, path: str, artifact: Artifact) -> bool:
    if not path.startswith(SOURCES):
        return project.store.has(artifact)
    try:  # what was fetched lies where it lies
        return project.memo.look(path) == artifact.digest
    except OSError:
        return False


def receipt_of(step: Step, record: Record) -> Receipt:
    """A step's receipt once it made, or was given, what this record names."""
    made = {name: (path, record.outputs[name].digest) for name, path in step.outputs.items()}
    return Receipt(key=record.key, outputs=made, refused=record.refused)


def read_receipt(path: str) -> Receipt | None:
    """A step's receipt, or None where there is none that can be read."""
    try:
        return receipt_from_bytes(read_whole(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def remember(project: Project, fresh: Fresh) -> None:
    """Note that everything is fresh, where it is: the signature of every path that this verdict rests on.

    Each is taken before what it is of is read, and at a time when no later write can leave it as it is: an edit between, or
    while the plan's steps ran, is not missed.
    """
    steps = _remembered(project)
    if project.problems or fresh.remembered or not all(map(fresh, steps)):
        return
    if 0 <= (age := time.time_ns() - fresh.changed) <= TICK:
        time.sleep((TICK - age) / 1e9 + 0.001)  # let the file system's clock pass what was just written
    start = time.time_ns()
    seen = {step.receipt: signature(step.receipt) for step in steps}
    with project.memo.noting() as noted:
        again = Fresh(project, anew=True)
        holds = all(again(step) for step in steps)
    if not holds or not project.current():
        return
    seen |= noted
    if any(racy(found, start) for found in seen.values()):
        return
    seen = project.guards | seen  # in this order: of data a plan asks only that they are there, a verdict what they hold
    note = {"identity": project.identity(), "seen": seen, "steps": [step.name for step in steps if step.verb != "build"]}
    try:
        write_whole(NOTE, sealed(json.dumps(note, separators=(",", ":")).encode()))
    except OSError:
        pass  # costs time only


def _remembered(project: Project) -> list[Step]:
    """The steps that a bare `doit` makes true: those on demand are not needed."""
    return [step for name in project.defaults() for step in project.of(name) if not step.on_demand]
