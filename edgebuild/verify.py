"""`edgebuild verify TARGET`: rebuild it apart, from the sources alone, and compare with what lies in `build/` and `dist/`.

Only steps whose bytes are promised are run: their verdicts and measurements have no part in a bundle. Nothing is taken from
the store, from the memo or from `build/`; the reports of conversion and packaging, and the logits of the source, hold measured
figures and are not compared. Of a signed file whose bytes differ each time, what its kind says is the same each time is compared.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgebuild import comparison, progress
from edgebuild.artifact import Receipt
from edgebuild.errors import FAILED, OK, StepFailed, UserError, shown
from edgebuild.fresh import Fresh, read_receipt
from edgebuild.memo import Memo
from edgebuild.noop import NOTE, STATE
from edgebuild.process import Workers, collect
from edgebuild.project import Project
from edgebuild.run import Builder
from edgebuild.step import Step

VERBS = ("fetch", "assess", "reference", "convert", "quantize", "choose", "package")
NOT_COMPARED = ("report", "logits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """An output of a step: how many files were compared, and a sentence for each that differs.

    `changed`: what lies there is not what its step had made; `signed`: the files of which all but signatures is equal.
    """

    step: str
    path: str
    files: int
    differences: tuple[str, ...]
    changed: bool
    signed: tuple[str, ...] = ()


def run(project: Project, target: str) -> int:
    """→ exit status."""
    collect(project.store.root)
    terminal = progress.display(len(steps_of(project, target)))
    try:
        builder = Builder(project, Fresh(project), Workers(), tell=terminal.told, watcher=terminal)
        found = verify(project, target, builder, terminal)
    finally:
        terminal.close()
    print(show(found, target))
    doubt(project, found)
    project.memo.save()
    return FAILED if any(one.differences for one in found) else OK


def steps_of(project: Project, target: str) -> list[Step]:
    return [step for step in project.of(target) if step.verb in VERBS and not step.on_demand]


def verify(project: Project, target: str, builder: Builder, display: progress.Display) -> list[Compared]:
    """Raises UserError where the target is not built as it stands, StepFailed where a step cannot be rebuilt."""
    steps = steps_of(project, target)
    receipts = _receipts(project, steps)
    with project.store.scratch() as scratch:
        made: dict[str, str] = {}
        for step in steps:
            if not _fetched(project, step):
                made |= _rebuild(_work(project, step), made, builder, display, f"{scratch}/{step.stem}")
        found = [
            _compare(step, path, made[path], receipts[step.name], _reader(project, step, name))
            if path in made
            else _hold(step, path, receipts[step.name])
            for step in steps
            for name, path in step.outputs.items()
            if name not in NOT_COMPARED
        ]
    if _receipts(project, steps) != receipts:
        raise StepFailed("a file of the project was edited meanwhile; verify again when the files are at rest")
    return found


def show(found: list[Compared], target: str) -> str:
    """A line for each output, one for each file that differs, and what that means."""
    lines = []
    for one in found:
        files = f"{one.files} file{'' if one.files == 1 else 's'}"
        signed = f", but for signatures in {', '.join(map(shown, one.signed))}" if one.signed else ""
        lines.append(f"{'different' if one.differences else 'equal':<10} {one.path:<40} {files}{signed}")
        lines += [f"  {difference}" for difference in one.differences]
    different = [one for one in found if one.differences]
    if own := [one.step for one in different if not one.changed]:
        lines.append(f"{own[0]} gives other bytes each time: {target} cannot be reproduced")
    if any(one.changed for one in different):
        lines.append(f"what lies here was changed after it was built; to put it right: edgebuild build:{target}")
    return "\n".join(lines)


def doubt(project: Project, found: list[Compared]) -> None:
    """What lies there and was changed is hashed anew by the next build, though its stat may say that nothing moved."""
    for one in found:
        if one.changed:
            project.memo.doubt(one.path)
            if os.path.exists(NOTE):
                os.unlink(NOTE)


def _work(project: Project, step: Step) -> Step:
    """The step itself; of a choice the recipe that was chosen, which makes what the choice is: its measurements have no part in that."""
    if step.verb != "choose":
        return step
    with open(step.outputs["report"], encoding="utf-8") as file:
        rung = json.load(file)["rung"]
    return replace(project.steps[f"quantize:{step.target}.{rung}"], outputs=step.outputs)


def _receipts(project: Project, steps: list[Step]) -> dict[str, Receipt]:
    """The receipts of the steps, each of them of the key that its step has now. Raises UserError where one is not."""
    found: dict[str, Receipt] = {}
    made: dict[str, str] = {}
    for step in steps:
        receipt = read_receipt(step.receipt)
        try:
            key: str | None = step.key({role: made.get(path) or project.memo.look(path) for role, path in step.inputs.items()})
        except OSError:
            key = None
        if receipt is None or receipt.key != key or {path for path, _ in receipt.outputs.values()} != {*step.outputs.values()}:
            state = "has not run" if receipt is None else "is not up to date"
            raise UserError(f"{step.name} {state}, so there is nothing to compare with; first: edgebuild build:{step.target}")
        found[step.name] = receipt
        made |= dict(receipt.outputs.values())
    return found


def _fetched(project: Project, step: Step) -> bool:
    """Whether a step brought the source from elsewhere: then what it brought is the source, and is not brought again."""
    return step.verb == "fetch" and bool(project.targets[step.target]["fetch"])


def _hold(step: Step, path: str, receipt: Receipt) -> Compared:
    """What was fetched against what its receipt says: a commit or a sha256 had said it before."""
    memo = Memo("")
    try:
        changed = (path, memo.look(path)) not in receipt.outputs.values()
        reason = f"{path}: its bytes are not those that were fetched"
    except OSError as error:
        changed, reason = True, f"{path}: is missing" if isinstance(error, FileNotFoundError) else str(error)
    files = len(comparison.files(memo, path)) if not changed else 0
    return Compared(step=step.name, path=path, files=files, differences=(reason,) if changed else (), changed=changed)


def _rebuild(step: Step, made: Mapping[str, str], builder: Builder, display: progress.Display, folder: str) -> dict[str, str]:
    """Run one step on what was rebuilt before it; → where its outputs would lie: where they lie now."""
    start = time.monotonic()
    display.started(step.name)
    os.mkdir(folder)
    inputs = {role: made.get(path, path) for role, path in step.inputs.items()}
    try:
        outputs, result = builder.act(step, inputs, folder, f"{STATE}/logs/{step.target}/verify.log")
    except StepFailed as error:
        raise StepFailed(f"{step.name}: {error}") from error
    placed = {}
    for name, path in step.outputs.items():
        placed[path] = os.path.abspath(f"{folder}/{path}")
        os.makedirs(os.path.dirname(placed[path]), exist_ok=True)
        os.rename(outputs[name], placed[path])
    display.ended(step.name, "rebuilt", time.monotonic() - start, result.summary)
    return placed


def _reader(project: Project, step: Step, output: str) -> comparison.Reader:
    kind = project.recipes[step.recipe]["params"].get("kind", "") if step.verb == "package" else ""
    return comparison.reader(kind, step.target, archive=output == "archive")


def _compare(step: Step, path: str, made: str, receipt: Receipt, read: comparison.Reader) -> Compared:
    memo = Memo("")  # of this comparison alone
    new = read(memo, made)
    try:
        old = read(memo, path)
    except OSError as error:
        reason = f"{path}: is missing" if isinstance(error, FileNotFoundError) else str(error)
        return Compared(step=step.name, path=path, files=len(new), differences=(reason,), changed=True)
    differences = comparison.differences(path, old, new)
    changed = (path, memo.look(path)) not in receipt.outputs.values()
    if changed and not differences:
        differences = (f"{path}: a signature, or what it covers no more, was changed",)
    return Compared(
        step=step.name,
        path=path,
        files=len({*old, *new}),
        differences=differences,
        changed=changed,
        signed=comparison.signed_otherwise(old, new),
    )
