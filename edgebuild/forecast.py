"""What building a target would do, make and need, before anything runs: states by `explain`, amounts by records and backends.

Nothing is executed and nothing written: a model is known by the headers of its files, where they are here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgebuild import digest, environment, toolchain, worker
from edgebuild.artifact import Record
from edgebuild.backend import Backend, Estimate, ModelFacts, facts_from_json
from edgebuild.backends import BACKENDS
from edgebuild.bundle import Copies
from edgebuild.bundles import BUNDLES
from edgebuild.errors import StepFailed
from edgebuild.explain import State, explain
from edgebuild.facts import facts_of
from edgebuild.fresh import read_receipt, receipt_of, stored
from edgebuild.original import IMPORTED, fits, memory_of
from edgebuild.project import Project
from edgebuild.resources import memory
from edgebuild.step import Step

# What a build would do with a step. `depends`: on what comes out of a step before it, whose output no record tells.
NOTHING, RESTORE, RUN, DEPENDS, BLOCKED = "nothing", "restore", "run", "depends", "blocked"
MEASURED, ESTIMATED, GIVEN, UNKNOWN = "measured", "estimated", "given", "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """Bytes, and how they are known: measured under this very key, estimated, given by the target, or unknown, and then why."""

    bytes: int | None
    basis: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """A step: its state as `explain` says it, what a build would do with it, what that makes and needs at its peak.

    `scratch`: of the store's disk, beside what it makes. `ran`: it has run here before. `refused`: why what follows would stop, by a record of this very key; else empty.
    """

    name: str
    verb: str
    state: str
    will: str
    ran: bool
    reason: str
    makes: Amount
    memory: Amount
    scratch: Amount
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a target makes of its model, out of its recipes. Sizes in bytes."""

    framework: str
    backend: Backend
    scheme: str
    parameters: Mapping[str, Any]  # of the first recipe, where several are tried
    rungs: tuple[str, ...] = ()  # the recipes that are tried, none where there is one alone
    calibrated: bool
    copies: Copies
    wheels: int = 0  # bytes of packages in the bundle, as far as they are here
    archived: bool
    gates: Mapping[str, Mapping[str, Any]]
    not_measured: str
    weights_limit: int | None
    memory_limit: int | None
    available: int  # of this machine's memory, now
    given: Mapping[str, int] = field(default_factory=dict)  # a step's name → what its target says of its memory

    def estimates(self, facts: ModelFacts) -> tuple[Estimate, Estimate]:
        """Of the baseline and of the candidate."""
        baseline = self.backend.estimate(facts, "none", {}, self.available)
        if self.scheme == "none":
            return baseline, baseline
        return baseline, self.backend.estimate(facts, self.scheme, self.parameters, self.available)

    def packed(self, artifact: int) -> tuple[int, int]:
        """(bytes that packing an artifact of this size makes, what it takes beside that meanwhile): the archive is made last."""
        held = artifact * (self.copies.bundle + self.copies.tests) + self.wheels
        makes = held * 2 if self.archived else held
        return makes, max(0, held + artifact * self.copies.scratch + self.copies.room - makes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Provision:
    """A toolchain in whose environment framework steps of a target run. `will`: make it, or nothing: it is there or not needed."""

    name: str
    installed: bool
    packages: int
    will: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """`facts` are None where the source is not here yet, or is refused: `unknown` says why, `refused` that nothing can be built.

    `toolchains` are those of the framework steps that do not run in this Python.
    """

    target: str
    choice: Choice
    facts: ModelFacts | None
    unknown: str
    refused: bool
    prospects: list[Prospect]
    toolchains: list[Provision]
    baseline: Amount
    candidate: Amount


def forecast(project: Project, target: str) -> Forecast:
    steps = {step.stem: step for step in project.of(target)}
    course = list(_course(project, target))
    files = dict(worker.files(Path(), steps["assess"].inputs))
    here = bool(steps["fetch"].inputs) or course[0][2] == NOTHING  # what comes from elsewhere may be of another day
    chosen = _choice(project, steps)
    facts, unknown, refused = _facts(steps["fetch"], files, here)
    expected = _expected(chosen, facts, unknown)
    sizes = {}
    for stem, step in (
        ("baseline", steps["convert"]),
        ("candidate", steps.get("choose") or steps.get("quantize") or steps["convert"]),
    ):
        # A choice of no recipe is refused: its model is an empty folder.
        record = next(record if record and not record.refused else None for one, _, _, record in course if one is step)
        sizes[stem] = _measured(record.outputs["model"].size) if record else expected.get((step.stem, "makes"), _UNKNOWN)
    prospects = [
        Prospect(
            name=step.name,
            verb=step.verb,
            state=state.state,
            will=will,
            ran=read_receipt(step.receipt) is not None,
            reason=state.reason,
            makes=_makes(record, expected.get((step.stem, "makes"))),
            memory=_memory(record, expected.get((step.stem, "memory"))),
            scratch=expected.get((step.stem, "scratch"), _UNKNOWN),
            refused=record.refused if record else "",
        )
        for step, state, will, record in course
    ]
    return Forecast(
        target=target,
        choice=chosen,
        facts=facts,
        unknown=unknown,
        refused=refused,
        prospects=prospects,
        toolchains=list(_provisions(project, course)),
        baseline=sizes["baseline"],
        candidate=sizes["candidate"],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What memory a step takes at its peak, and what that comes from."""

    choice: Choice
    facts: ModelFacts | None
    amount: Amount


def need(project: Project, step: Step) -> Need:
    """Of a step whose model was assessed, as it is about to run: as a forecast says it, but by no header."""
    steps = {one.stem: one for one in project.of(project.owner(step))}
    choice = _choice(project, steps)
    try:
        with open(steps["assess"].outputs["facts"], encoding="utf-8") as file:
            facts, unknown = facts_from_json(json.load(file)), ""
    except (OSError, ValueError, TypeError) as error:
        facts, unknown = None, str(error)
    expected = _expected(choice, facts, unknown)
    stem, verb = step.stem, step.verb
    if verb == "answer":  # it runs an artifact as an evaluation does
        stem, verb = "evaluate" if project.steps[step.after[0]].verb != "convert" else "evaluate.baseline", "evaluate"
    amount = expected.get((stem, "memory")) or expected.get((verb, "memory")) or _UNKNOWN
    return Need(choice=choice, facts=facts, amount=amount)


def _choice(project: Project, steps: Mapping[str, Step]) -> Choice:
    def params(stem: str) -> dict[str, Any]:
        found: dict[str, Any] = project.recipes[steps[stem].recipe]["params"] if stem in steps else {}
        return found

    rungs = tuple(params("choose").get("order", ()))
    quantize = params(f"quantize.{rungs[0]}" if rungs else "quantize")
    framework = project.recipes[steps["convert"].recipe]["backend"]
    return Choice(
        framework=framework,
        backend=BACKENDS[framework],
        scheme=quantize.get("scheme", "none"),
        parameters={key: value for key, value in quantize.items() if key not in ("task", "scheme", "samples")},
        rungs=rungs,
        calibrated=bool(rungs) or ("quantize" in steps and "calibration" in steps["quantize"].inputs),
        copies=BUNDLES[params("package")["kind"]].COPIES,
        wheels=_wheels(params("package").get("wheels", "")),
        archived="archive" in steps["package"].outputs,
        gates=params("gate")["gates"],
        not_measured=params("benchmark")["not_measured"],
        weights_limit=params("package")["limits"]["weights"],
        memory_limit=project.targets[steps["package"].target]["memory"],
        available=memory().available,
        given=project.targets[steps["package"].target]["estimates"],
    )


def _wheels(label: str) -> int:
    """Bytes of those that a package step's key names, nothing where they are not here yet."""
    lock = toolchain.read(label.partition(" ")[0]) if label else None
    found = environment.note(lock.digest) if lock else None
    return found.bytes if found else 0


def _facts(fetch: Step, files: Mapping[str, Path], here: bool) -> tuple[ModelFacts | None, str, bool]:
    """(facts, why there are none, whether that is because the source is refused), by what fetch and assess themselves check."""
    if not here:
        return None, f"known after {fetch.name}", False
    try:
        return facts_of(files), "", False
    except StepFailed as error:
        return None, str(error), True


# -- what will happen ---------------------------------------------------------------------------------------------------
def _course(project: Project, target: str) -> Iterator[tuple[Step, State, str, Record | None]]:
    """Every step with its state, what a build would do with it, and the record of the key that it will have, if there is one.

    Those on demand are a matter of the step that runs them.
    """
    states = {state.name: state for state in explain(project, target)}
    made: dict[str, str | None] = {}  # path → digest of its content by then; None: not known before
    stopped: set[str] = set()
    for step in project.of(target):
        if step.on_demand:
            continue
        state = states[step.name]
        key = _key(project, step, made)
        record = project.store.record(key) if key else None
        if not stopped.isdisjoint(step.after):
            will = BLOCKED
        elif state.state == "fresh":
            will = NOTHING
        else:
            will = DEPENDS if key is None else RESTORE if stored(project, step, key) else RUN
        if will == BLOCKED or (will == RESTORE and record and record.refused):
            stopped.add(step.name)
        made |= _made(project, step, will, record)
        yield step, state, will, record


def _key(project: Project, step: Step, made: Mapping[str, str | None]) -> str | None:
    inputs = {}
    for role, path in step.inputs.items():
        try:
            content = made[path] if path in made else project.memo.of(path)
        except OSError:
            content = None
        if content is None:
            return None
        inputs[role] = content
    return step.key(inputs)


def _made(project: Project, step: Step, will: str, record: Record | None) -> dict[str, str | None]:
    """The content of a step's outputs and receipt, once a build has come past it."""
    if will == NOTHING:
        return {path: project.memo.of(path) for path in (*step.outputs.values(), step.receipt)}
    if will == RESTORE and record:
        outputs: dict[str, str | None] = {path: record.outputs[name].digest for name, path in step.outputs.items()}
        return {**outputs, step.receipt: digest.of_bytes(receipt_of(step, record).to_bytes())}
    return dict.fromkeys((*step.outputs.values(), step.receipt))


def _provisions(project: Project, course: list[tuple[Step, State, str, Record | None]]) -> Iterator[Provision]:
    """By the locks that the steps' keys hold: an environment is made for the first step that runs in it, wheels for one that packs them."""
    wills: dict[str, set[str]] = {}
    for step, _, will, _ in course:
        recipe = project.recipes[step.recipe]
        for label in filter(None, (recipe.get("toolchain", {}).get("lock"), recipe["params"].get("wheels"))):
            wills.setdefault(label.partition(" ")[0], set()).add(will)
    for lock in filter(None, map(toolchain.read, wills)):
        installed = environment.whole(lock.digest)
        will = RUN if not installed and not wills[lock.name].isdisjoint((RUN, DEPENDS)) else NOTHING
        yield Provision(name=lock.name, installed=installed, packages=len(lock.pins), will=will)


# -- how much -----------------------------------------------------------------------------------------------------------
_UNKNOWN = Amount(bytes=None, basis=UNKNOWN, reason="headers and small files only")


def _measured(amount: int) -> Amount:
    return Amount(bytes=amount, basis=MEASURED)


def _expected(choice: Choice, facts: ModelFacts | None, unknown: str) -> dict[tuple[str, str], Amount]:
    """(step's stem, `makes`, `memory` or `scratch`) → an estimate. Of what is not here nothing is said: it is small."""
    stems = ("reference", "convert", "quantize", "choose", "evaluate.baseline", "evaluate", "benchmark", "package")
    if facts is None:
        nothing = Amount(bytes=None, basis=UNKNOWN, reason=unknown)
        return _corrected(choice, dict.fromkeys(((stem, what) for stem in stems for what in ("makes", "memory")), nothing))
    baseline, candidate = choice.estimates(facts)
    packed, scratch = choice.packed(candidate.artifact)
    source = memory_of(sum(facts.parameters.values()))
    amounts = {
        ("reference", "memory"): source if fits(source, choice.available) else IMPORTED,  # then it is not run
        ("convert", "makes"): baseline.artifact,
        ("convert", "memory"): baseline.making,
        ("quantize", "makes"): candidate.artifact,
        ("quantize", "memory"): candidate.making,
        ("choose", "makes"): candidate.artifact,
        ("choose", "memory"): max(candidate.making, candidate.running),  # of the recipes that it tries
        ("evaluate.baseline", "memory"): baseline.running + baseline.holding,
        ("evaluate", "memory"): candidate.running,
        ("benchmark", "memory"): max(baseline.running, candidate.running),
        ("package", "makes"): packed,
        ("package", "scratch"): scratch,
        # Each further format is made by a runtime that holds the model about three times; measured on ONNX Runtime.
        ("package", "memory"): candidate.running + 3 * candidate.artifact * choice.copies.converted,
    }
    if choice.not_measured:
        del amounts["benchmark", "memory"]  # bytes are counted, and nothing is run
    return _corrected(choice, {what: Amount(bytes=amount, basis=ESTIMATED) for what, amount in amounts.items()})


def _corrected(choice: Choice, amounts: dict[tuple[str, str], Amount]) -> dict[tuple[str, str], Amount]:
    """With what the target says by a step's name, or by its verb; of a choice what says most of its recipes' steps."""
    for stem, what in amounts:
        given = choice.given.get(stem, choice.given.get(stem.split(".")[0]))
        if what == "memory" and given is not None:
            amounts[stem, what] = Amount(bytes=given, basis=GIVEN)
    tried = [amounts[stem, "memory"] for stem in ("quantize", "evaluate")]
    amounts["choose", "memory"] = max(tried, key=lambda amount: amount.bytes or 0)
    return amounts


def _makes(record: Record | None, expected: Amount | None) -> Amount:
    if record:
        return _measured(sum(artifact.size for artifact in record.outputs.values()))
    return expected or _UNKNOWN


def _memory(record: Record | None, expected: Amount | None) -> Amount:
    if record and record.peak_memory is not None and not (expected and expected.basis == GIVEN):
        return _measured(record.peak_memory)
    return expected or _UNKNOWN
