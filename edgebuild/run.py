"""Step → what it made: key → record in the store: restore; else a worker, then publish. Also what must go from `dist/`."""

import functools
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgebuild import ladder, machine, machinelock, roots
from edgebuild.artifact import Artifact, Receipt, Record
from edgebuild.errors import InputChanged, PartFailed, Refused, StepFailed, disk
from edgebuild.explain import why
from edgebuild.files import make_folder, remove_tree, rename_over, user_cache, write_new, write_whole
from edgebuild.fresh import Fresh, read_receipt, receipt_of, stored
from edgebuild.memo import signatures
from edgebuild.noop import STATE, Signature
from edgebuild.process import Result, Workers
from edgebuild.project import Project
from edgebuild.provide import Toolchains, Unwatched, Watcher
from edgebuild.step import ACROSS, SOURCES, Step

IN_PROCESS = ("gate", "build")  # arithmetic on small files of our own: a process would cost more than the work
TRIES = 3  # times that a step is run anew because an input was edited while it ran
# These do not look at a clock: they may stand still while a measurement has the machine. A download would be given up by the other side, and
# what a package is tried on has its time.
STILL = ("assess", "reference", "convert", "quantize", "evaluate", "answer", "agree")
Perform = Callable[[Mapping[str, Any], str, str, int | None, float, str, int | None], Result]


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """How a step ended: `ran` or `restored`, why, and what to tell."""

    name: str
    outcome: str
    reason: str
    seconds: float
    summary: str


class Builder:
    """Runs steps of one project. `perform` is the seam: a worker process, or in tests this one.

    `tell` is told (step, what) where a step waits for somebody else, `watcher` how a toolchain is made.
    `within` runs a step that another one needs.
    """

    def __init__(
        self,
        project: Project,
        fresh: Fresh,
        workers: Workers,
        perform: Perform | None = None,
        tell: Callable[[str, str], None] = lambda step, what: None,
        watcher: Watcher | None = None,
        within: Callable[[Step, Callable[[Step], Done]], Done] = lambda step, run: run(step),
    ) -> None:
        self.project, self.fresh, self._tell, self._within = project, fresh, tell, within
        self._perform: Perform = perform or workers.perform
        self._toolchains = Toolchains(workers.command, watcher or Unwatched(), self._beside_measurements)
        self._made: dict[str, Mapping[str, str]] = {}
        try:
            roots.register(project.store.root)
        except OSError as error:
            raise StepFailed(disk(error)) from error

    def run(self, step: Step) -> Done:
        """Make a step's outputs true. Raises StepFailed with one message; then nothing of it is visible."""
        start = time.monotonic()
        try:
            return self._run(step, start)
        except OSError as error:
            raise StepFailed(disk(error)) from error

    def _run(self, step: Step, start: float) -> Done:
        before = read_receipt(step.receipt)
        look = self.project.memo.of  # what a run has seen will do for a restore: its receipt says of which inputs it is
        for _ in range(TRIES):
            inputs = self._inputs(step, look)
            key = step.key(inputs)
            with self.project.store.lock(key):
                again = step.name in self.fresh.again
                reason = "it was asked to run again" if again else why(self.project, step, before, inputs)
                with self._beside_gc(step):
                    record = None if again else stored(self.project, step, key)
                    if record is not None:
                        self.project.store.touch(key)
                        self._deliver(step, record, before)
                outcome = "restored" if record else "ran"
                if record is None:
                    record = self._make(step, key, inputs, before)
                if record is not None:
                    break
                look = self.project.memo.look
        else:
            raise InputChanged(
                f"an input was edited while it ran, {TRIES} times; nothing was kept; build again when the files are at rest"
            )
        self.fresh.ran(step, bool(record.refused))
        if step.verb == "choose":
            self._drop_rungs(step)
        if record.refused:
            self._refuse(step)
            raise StepFailed(record.refused)
        seconds = time.monotonic() - start
        return Done(name=step.name, outcome=outcome, reason=reason, seconds=seconds, summary=record.summary)

    def _inputs(self, step: Step, look: Callable[[str], str]) -> dict[str, str]:
        """The digest of every input by this `look`. What a step before made must be what its receipt says."""
        try:
            found = {role: look(path) for role, path in step.inputs.items()}
        except FileNotFoundError as error:
            raise StepFailed(f"its input {error.filename} is missing") from error
        for name in step.after:
            made = self._what_made(self.project.steps[name])
            for role, path in step.inputs.items():
                if made.get(path, found[role]) != found[role]:
                    raise StepFailed(f"{path} is not what {name} made: something else wrote there; build again")
        return found

    def _what_made(self, step: Step) -> Mapping[str, str]:
        """Path → digest of a step's outputs, as its receipt says; a receipt is read once, or written here."""
        if step.name not in self._made:
            receipt = read_receipt(step.receipt)
            self._made[step.name] = dict(receipt.outputs.values()) if receipt else {}
        return self._made[step.name]

    def _make(self, step: Step, key: str, inputs: Mapping[str, str], before: Receipt | None) -> Record | None:
        """Run the action, publish and deliver; None where an input was edited meanwhile, and then nothing is kept.

        Also where it was edited back before the action ended: its digest is the same, and the action may have read another.
        """
        seen = _seen(step)
        if self._inputs(step, self.project.memo.look) != inputs:
            return None
        log = f"{STATE}/logs/{step.target}/{step.stem}.log"
        with self.project.store.scratch() as scratch:
            download = self._download(step, key, scratch)
            outputs, result = self.act(step, step.inputs, scratch, log, download)
            if _seen(step) != seen or self._inputs(step, self.project.memo.look) != inputs:
                return None
            with self._beside_gc(step):
                record = self._publish(step, key, inputs, outputs, result, _digest_of_log(self.project, log))
                self._deliver(step, record, before)
        return record

    def _publish(
        self, step: Step, key: str, inputs: Mapping[str, str], outputs: Mapping[str, str], result: Result, log: str
    ) -> Record:
        components = self.project.recipes[step.recipe]
        try:
            made = {name: self._take_in(outputs[name], path) for name, path in step.outputs.items()}
        except FileNotFoundError as error:
            raise StepFailed(
                "it ended without making all of its outputs; this is a fault of edgebuild or of the framework"
            ) from error
        record = Record(
            key=key,
            name=step.name,
            outputs=made,
            components={"recipe": components, "inputs": dict(inputs)},
            summary=result.summary,
            refused=result.refused,
            seconds=round(result.seconds, 3),
            peak_memory=result.peak_memory,
            toolchain=components.get("toolchain", {}),
            host={"isa": machine.isa(), "network": result.network},
            log=log,
        )
        self.project.store.keep(record)
        return record

    def _download(self, step: Step, key: str, scratch: str) -> Mapping[str, str] | None:
        """Where an unfinished download stays; what the store has already is not downloaded again, whatever key it had."""
        given = self.project.targets[step.target]["fetch"] if step.verb == "fetch" else None
        if not given:
            return None
        partial = os.path.abspath(f"{self.project.store.root}/partial/{key}")
        known = Artifact(digest=self.project.recipes[step.recipe]["params"].get("sha256", ""), tree=False, size=0)
        with self._beside_gc(step):
            if known.digest and self.project.store.has(known):
                self.project.store.materialise(known, partial, link=True)
        return {**given, "partial": partial, "progress": os.path.abspath(f"{scratch}/progress.json")}

    def _take_in(self, made: str, path: str) -> Artifact:
        """Into the store; or to where it stays, if it is links to what lies elsewhere."""
        if not path.startswith(SOURCES):
            return self.project.store.publish(made)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.project.store.remove(path)
        os.rename(made, path)
        memo = self.project.memo
        memo.forget(path)
        return Artifact(digest=memo.look(path), tree=os.path.isdir(path), size=memo.size(path))

    def act(
        self, step: Step, inputs: Mapping[str, str], scratch: str, log: str, download: Mapping[str, str] | None = None
    ) -> tuple[dict[str, str], Result]:
        """Run a step's action on these inputs; → its outputs, below `scratch`, and how it went. Nothing is kept.

        Raises StepFailed with one message.
        """
        components = self.project.recipes[step.recipe]
        outputs = {name: os.path.abspath(f"{scratch}/{name}") for name in step.outputs}
        if step.verb == "choose":
            return outputs, self._choose(step, outputs)
        action: dict[str, Any] = {
            "name": step.name,
            "verb": step.verb,
            "backend": components.get("backend", ""),
            "params": components["params"],
            "toolchain": components.get("toolchain", {}),
            "root": os.getcwd(),
            "inputs": dict(inputs),
            "outputs": outputs,
        }
        if download:
            action["download"] = download
        if "sign" in components["params"]:
            action["sign"] = self.project.targets[step.target]["sign"]
        if step.verb in IN_PROCESS:
            from edgebuild.worker import perform

            start = time.monotonic()
            outcome = perform(action)
            seconds = time.monotonic() - start
            return outputs, Result(
                summary=outcome.summary, refused=outcome.refused, network="", seconds=seconds, peak_memory=None
            )
        limits = self.project.targets[self.project.owner(step)]
        still = step.verb in STILL
        from edgebuild import heavy

        with (
            self._toolchains.interpreter(components.get("toolchain", {}).get("lock", "")) as python,
            self._image(action),
            heavy.admitted(self.project, step, lambda: self._tell(step.name, heavy.WAITS)),
            self._beside_measurements(step.name, still) as held,
        ):
            folders = os.path.abspath(scratch), os.path.abspath(log)
            if "machine" in components:  # it prepares beside others, and has the machine to itself when it measures
                action["alone"] = {"folder": user_cache(), "held": held, "waits": f"{folders[0]}/waits"}
            shares = held if still else None
            result = self._perform(action, *folders, limits["memory"], limits["time"], python, shares)
        if result.kept:
            from edgebuild.worker import files

            given = dict(files(Path(), inputs))
            for place, role in result.kept.items():
                self.project.store.copy(str(given[role]), f"{scratch}/{place}")
        return outputs, result

    @contextmanager
    def _image(self, action: dict[str, Any]) -> Iterator[None]:
        """What a bundle that is built to an image takes: wheels, whose lock is in the key, and what the image is tried on."""
        label = action["params"].get("wheels", "")
        if not label:
            yield
            return
        with self._toolchains.wheels(label.partition(" for ")[0]) as folder, self._toolchains.base() as (base, missing):
            action["image"] = {"wheels": folder, "base": base, "no_base": missing}
            yield

    def _beside_measurements(self, name: str, still: bool = False) -> AbstractContextManager[int]:
        return machinelock.shared(lambda: self._tell(name, machinelock.BESIDE), still)

    def _choose(self, step: Step, outputs: Mapping[str, str]) -> Result:
        """Walk a ladder: the chosen rung's model is linked from the store. Where none holds, `model` is an empty folder."""
        start = time.monotonic()
        with open(step.inputs["facts"], encoding="utf-8") as file:
            facts = json.load(file)
        found = ladder.walk(self.project.recipes[step.recipe]["params"], facts, functools.partial(self._climb, step))
        if found.chosen:
            made = self._artifact(self.project.steps[f"quantize:{step.target}.{found.chosen}"])
            with self._beside_gc(step):
                self.project.store.materialise(made, outputs["model"], link=True)
        else:
            os.mkdir(outputs["model"])
        with open(outputs["report"], "w", encoding="utf-8") as file:
            file.write(json.dumps(found.report, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
        failing = sum(row["held"] is False for row in found.report["rungs"])
        before = f", {failing} before it did not" if failing else ""
        summary = f"{found.chosen} holds{before}: {found.why}" if found.chosen else f"none of {failing} holds"
        seconds = time.monotonic() - start
        return Result(summary=summary, refused="" if found.chosen else found.why, network="", seconds=seconds, peak_memory=None)

    def _climb(self, step: Step, rung: str) -> ladder.Made:
        """Make one rung's steps true. Raises Refused where the recipe is no use, PartFailed where something else is wrong."""
        quantize, evaluate = (self.project.steps[f"{verb}:{step.target}.{rung}"] for verb in ("quantize", "evaluate"))
        for one in (quantize, evaluate):
            try:
                self._within(one, self.run)
            except Refused:
                raise
            except StepFailed as error:
                raise PartFailed(one.name, error) from error
        found = {}
        for name, path in (("report", quantize.outputs["report"]), ("measurements", evaluate.outputs["measurements"])):
            with open(path, encoding="utf-8") as file:
                found[name] = json.load(file)
        baseline, candidate = (
            self.project.memo.size(one.outputs["model"]) for one in (self.project.steps[f"convert:{step.target}"], quantize)
        )
        return ladder.Made(**found, baseline=baseline, candidate=candidate)

    def _artifact(self, step: Step) -> Artifact:
        """The model that a step made. Raises StepFailed where its record is gone."""
        receipt = read_receipt(step.receipt)
        record = self.project.store.record(receipt.key) if receipt else None
        if record is None:
            raise StepFailed(f"the record of {step.name} is no longer in the store; build again")
        return record.outputs["model"]

    def _drop_rungs(self, step: Step) -> None:
        """What rungs had made for another day's inputs goes: what stays of them is what a walk today would make."""
        for other in self.project.of(step.target):
            if other.on_demand and os.path.exists(other.receipt) and not self.fresh(other):
                clean(self.project, other)

    def _beside_gc(self, step: Step) -> AbstractContextManager[int]:
        """Held while objects are looked up, published and delivered, until the receipt says that they are needed."""
        return self.project.store.held(waits=lambda: self._tell(step.name, "waits for edgebuild gc"))

    def _deliver(self, step: Step, record: Record, before: Receipt | None) -> None:
        """Put the outputs in place, then the receipt that says so; what an earlier run had put elsewhere goes.

        Only what a receipt lists is ever removed, and outputs that we are killed behind must go with their target like any
        other: where there is no receipt yet, it stands under the name of one begun meanwhile; where one lists other paths, one
        without a key takes its place.
        """
        store, memo = self.project.store, self.project.memo
        receipt, begun = receipt_of(step, record), _begun(step.receipt)
        paths = set(step.outputs.values())
        earlier = {path for path, _ in before.outputs.values()} if before else _listed(begun)
        for path in sorted(earlier - paths):
            if _ours(path, step.receipt):
                store.remove(path)
        if before is None:
            try:  # torn, it is none; and then nothing was delivered yet
                make_folder(os.path.dirname(begun))
                write_new(begun, receipt.to_bytes())
            except FileExistsError:
                write_whole(begun, receipt.to_bytes())
        elif earlier != paths:
            write_whole(step.receipt, replace(receipt, key="").to_bytes())
        for name, path in step.outputs.items():
            artifact = record.outputs[name]
            if not path.startswith(SOURCES) and not self._in_place(path, artifact):
                store.materialise(artifact, path, link=not path.startswith("dist/"))
            memo.forget(path)
        if before is None:
            rename_over(begun, step.receipt)
        else:
            write_whole(step.receipt, receipt.to_bytes())
        self._made[step.name] = dict(receipt.outputs.values())
        memo.forget(step.receipt)

    def _in_place(self, path: str, artifact: Artifact) -> bool:
        try:
            mode = os.lstat(path).st_mode
            whole = stat.S_ISDIR(mode) if artifact.tree else stat.S_ISREG(mode)
            return whole and self.project.memo.look(path) == artifact.digest
        except OSError:
            return False

    def _refuse(self, step: Step) -> None:
        """A step stops the target: what an earlier build made behind it and delivered goes, the evidence says why."""
        behind = self.project.behind(step)
        for other in behind:
            withdraw(self.project, other.receipt, *other.outputs.values())
        build = behind[-1]
        action = {
            "verb": "build",
            "backend": "",
            "params": self.project.recipes[build.recipe]["params"],
            "root": os.getcwd(),
            "inputs": {role: path for role, path in build.inputs.items() if os.path.exists(path)},
        }
        from edgebuild.worker import perform

        with self.project.store.scratch() as scratch:
            perform({**action, "outputs": {name: os.path.abspath(f"{scratch}/{name}") for name in build.outputs}})
            with open(f"{scratch}/evidence", "rb") as file:
                write_whole(build.outputs["evidence"], file.read())


def _seen(step: Step) -> dict[str, Signature | None]:
    """What tells whether a path that a step reads was touched; without ctime, which our own hard links to an object move."""
    found = {part: one for path in step.inputs.values() for part, one in signatures(path)}
    return {part: one and [one[0], *one[2:]] for part, one in found.items()}


def withdraw(project: Project, receipt: str, *planned: str) -> None:
    """Remove what a receipt lists, and what its step is `planned` to make (the receipt may be damaged), then the receipt.

    Only paths where that step's outputs lie are ever removed. Raises OSError where one cannot be: then the receipt stays, and
    the next build tries again.
    """
    for path in sorted({*planned, *_listed(receipt), *_listed(_begun(receipt))}):
        if _ours(path, receipt):
            project.store.remove(path)
    project.store.remove(receipt)
    project.store.remove(_begun(receipt))


def _begun(receipt: str) -> str:
    """Where a receipt stands while what it lists is delivered."""
    return receipt.removesuffix(".json") + ".begun"


def _listed(receipt: str) -> set[str]:
    found = read_receipt(receipt)
    return {path for path, _ in found.outputs.values()} if found else set()


def clean(project: Project, step: Step) -> None:
    """Remove what a step made, its receipt and its log; folders that this leaves empty go too. Raises OSError as `withdraw`."""
    withdraw(project, step.receipt, *step.outputs.values())
    remove_tree(f"{STATE}/logs/{step.target}/{step.stem}.log")
    for folder in (f"build/{step.target}/{step.stem}", f"build/{step.target}", "build", "dist"):
        try:
            os.rmdir(folder)
        except OSError:
            pass


def sweep(project: Project) -> dict[str, str]:
    """Remove what steps and targets that are no more had made, by their receipts; → target → why that could not be."""
    known = {step.receipt for step in project.steps.values()}
    known.update(path for step in project.of(ACROSS) for path in step.outputs.values())  # a matrix lies among receipts
    problems: dict[str, str] = {}
    if not project.problems:
        _forget_sources(project)
    for target in _names("build"):
        if any(target == name or target.startswith(f"{name}-") for name in project.problems):
            continue  # it cannot be planned today, or is one of a file's that cannot be read; what it made stays
        for name in _names(f"build/{target}"):
            stem, ending = os.path.splitext(name)
            path = f"build/{target}/{stem}.json"
            if ending in (".json", ".begun") and name != "evidence.json" and path not in known:
                try:
                    withdraw(project, path)
                except OSError as error:
                    problems[target] = f"what it had made cannot be removed: {error.filename}: {error.strerror}"
        for folder in (*(f"build/{target}/{name}" for name in _names(f"build/{target}")), f"build/{target}"):
            try:
                os.rmdir(folder)  # only where it is empty
            except OSError:
                pass
    return problems


def _forget_sources(project: Project) -> None:
    """Remove folders of links that no step brings any more; the model files that they show stay in their own cache."""
    wanted = {path for step in project.steps.values() for path in step.outputs.values()}
    for place, _, _ in os.walk(SOURCES, topdown=False):
        if place not in wanted and not any(path.startswith(f"{place}/") or place.startswith(f"{path}/") for path in wanted):
            remove_tree(place)


def _ours(path: str, receipt: str) -> bool:
    """Whether a path that a receipt lists may be removed: it lies where this step's outputs lie, and no other's."""
    _, target, name = receipt.split("/")
    delivered = {
        "package.json": (f"dist/{target}", f"dist/{target}.tar"),
        "build.json": (f"dist/{target}.evidence.json", f"build/{target}/evidence.json"),
    }
    if target == ACROSS and path == f"build/{ACROSS}/{name.removeprefix('agree.')}":
        return name.startswith("agree.")
    inside = path.startswith(receipt.removesuffix(".json") + "/") and os.path.normpath(path) == path
    return inside or path in delivered.get(name, ())


def _digest_of_log(project: Project, log: str) -> str:
    try:
        return project.memo.look(log)
    except OSError:
        return ""


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
