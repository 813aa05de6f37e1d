"""A project on disk: its plan, taken from the plan cache while nothing it was made from has changed.

Plans of before are kept beside it: who undoes an edit, or goes back to a branch, has the plan that was made of those texts.
A no-op imports none of yaml, jsonschema, jinja2 or a framework: those are behind `_make`, which a new text calls.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import digest, machine, shipped
from edgebuild.files import remove_tree, sealed, unsealed, write_whole
from edgebuild.memo import MEMO, Memo
from edgebuild.noop import SIGN, STATE, THERE, Signature, identity, moved, racy, signature
from edgebuild.step import Step
from edgebuild.store import Store

FOLDERS = ("targets", "platforms")  # of texts that plans are made of
BEFORE, KEPT = f"{STATE}/before", 8  # plans of before, by what they were made from; that many at most
PLAN, RECIPES = "plan.json", "recipes.json"

if TYPE_CHECKING:
    from edgebuild.backend import ModelFacts, Needs
    from edgebuild.errors import TargetError
    from edgebuild.plan import Surroundings
    from edgebuild.signing import Pair, Takes
    from edgebuild.source import Found
    from edgebuild.target import Target
    from edgebuild.toolchain import Versions


class Project:
    """The project in the current directory. `version` overrides every target's package.version."""

    def __init__(self, version: str | None = None, strict: bool = False) -> None:
        self.version, self.strict = version, strict
        self.memo = Memo(MEMO)
        self.store = Store(os.environ.get("EDGEBUILD_STORE") or STATE, self.memo)
        self.guards: dict[str, Signature | None] = {}  # of what the plan was made from, as it was then
        self.settled = True  # whether no write could have left a guard as it was
        self._recipes: dict[str, dict[str, Any]] | None = None
        self.targets: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, Step] = {}
        self._by_target: dict[str, list[Step]] = {}
        self.problems: dict[str, str] = {}
        self.groups: dict[str, list[str]] = {}  # name of a file with a matrix → its targets
        if not self._load():
            self._make()

    @property
    def recipes(self) -> Mapping[str, dict[str, Any]]:
        """The components of every recipe, by its digest: what runs and what `explain` shows."""
        if self._recipes is None:
            try:
                with open(f"{STATE}/{RECIPES}", "rb") as file:
                    self._recipes = json.loads(unsealed(file.read()))
            except (OSError, ValueError):
                self._recipes = {}
            if any(step.recipe not in self._recipes for step in self.steps.values()):
                self._make()  # the file was lost, or belongs to another plan
        return self._recipes

    def names(self) -> list[str]:
        """Every target's name, sorted, those with problems too (a file's own where its targets are not known)."""
        return sorted({*self.targets, *self.problems})

    def defaults(self) -> list[str]:
        """The targets that a bare `doit` builds."""
        return [name for name in self.names() if name in self.problems or self.targets[name]["default"]]

    def of(self, target: str) -> list[Step]:
        if not self._by_target:
            for step in self.steps.values():
                self._by_target.setdefault(step.target, []).append(step)
        return self._by_target.get(target, [])

    def behind(self, step: Step) -> list[Step]:
        """The steps that cannot be true where this one is not: those of its target that come after it."""
        names, found = {step.name}, []
        for other in self.of(step.target):  # in order
            if not names.isdisjoint(other.after):
                names.add(other.name)
                found.append(other)
        return found

    def owner(self, step: Step) -> str:
        """The target whose limits hold for a step: its own, or that of what it follows where several targets share it."""
        while step.target not in self.targets:
            step = self.steps[step.after[0]]
        return step.target

    def identity(self) -> list[Any]:
        return identity(self.version, self.strict)

    def current(self) -> bool:
        """Whether the plan is of what lies there now, for all that stats can tell."""
        return self.settled and not any(moved(signature(path), was) for path, was in self.guards.items())

    # -- the plan cache -----------------------------------------------------------------------------------------------
    def _load(self) -> bool:
        """Take the plan of the last run where it holds, else one of before that does."""
        start = time.time_ns()
        try:
            cached = _read_plan(STATE)
            touched = self._touched(cached)
            if touched is None:
                cached = self._go_back(cached)
                touched = self._touched(cached)
            if cached is None or touched is None:
                return False
            if touched:
                cached["guards"] |= touched
                self.settled = not any(racy(found, start) for found in touched.values())
                self._keep(cached)
            self.guards, self.targets, self.problems = cached["guards"], cached["targets"], cached["problems"]
            self.groups = cached["groups"]
            one = sys.intern  # equal texts are kept once: steps share paths, recipes and names
            for name, verb, target, recipe, inputs, outputs, after, on_demand in cached["steps"]:
                self.steps[name] = Step(
                    name=one(name),
                    verb=one(verb),
                    target=one(target),
                    recipe=one(recipe),
                    inputs={role: one(path) for role, path in inputs.items()},
                    outputs={role: one(path) for role, path in outputs.items()},
                    after=tuple(map(one, after)),
                    on_demand=bool(on_demand),
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.steps.clear()
            return False
        return True

    def _touched(self, cached: dict[str, Any] | None) -> dict[str, Signature | None] | None:
        """What moved of the guards of a plan that is today's all the same; None where it is not, or there is none.

        Texts may move that say the same, and model files that a new look finds to be of the same format and parts.
        """
        if cached is None or cached["identity"] != self.identity():
            return None
        sources, texts = cached["sources"], cached["texts"]
        touched = {path: found for path, known in cached["guards"].items() if moved(found := signature(path), known)}
        models = touched.keys() - texts.keys() - set(FOLDERS)
        if not models <= sources.keys() or (len(models) < len(touched) and self._texts() != texts):
            return None
        if models:
            from edgebuild import source

            for path in models:
                lies = source.find(".", path, "", "")
                if _listed(lies, [_facts_of(lies)] if len(sources[path]) > 2 else []) != sources[path]:
                    return None
        return touched

    def _go_back(self, last: dict[str, Any] | None) -> dict[str, Any] | None:
        """Put the plan that was made of today's texts in the place of the last run's, which is put aside; None where there is none."""
        place = _place(self.identity(), self._texts())
        aside = _place(last["identity"], last["texts"]) if last else ""
        if aside == place:
            return None  # what moved is no text
        if aside:
            _move(STATE, aside)
        cached = _read_plan(place)
        if cached is not None:
            _move(place, STATE)
        return cached

    def _texts(self) -> dict[str, str]:
        """Path → digest of every target and platform file of the project, each as it is now: an edit may come at any moment."""
        return {path: self.memo.look(path) if os.path.isfile(path) else "" for path in _text_files()}

    def _make(self) -> None:
        from edgebuild import agreements, load, plan
        from edgebuild.errors import TargetError

        seen = _Seen(self)
        seen.guard(*FOLDERS, "templates")
        found = load.names(".")
        seen.guard(*_text_files())
        texts = self._texts()
        targets, around = load.Targets(".", found), seen.surroundings()
        whole = plan.Plan(problems=targets.problems)
        for file, names in targets.files.items():
            failed: dict[str, TargetError] = {}
            for name in names:
                try:
                    plan.add(whole, targets.target(name, self.version), around, self.strict)
                except TargetError as error:
                    failed[name] = error
            whole.problems |= _problems(names, failed)
            if names != [file]:
                whole.groups[file] = names
        agreements.add(whole)
        self.targets, self.steps, self.problems, self.groups = whole.targets, whole.steps, whole.problems, whole.groups
        self._by_target.clear()
        self._recipes = whole.recipes
        self.guards, self.settled = seen.guards, seen.settled
        if all(signature(path) == self.guards[path] for path in (*FOLDERS, *texts)):  # else: of which text is this the plan?
            self._save(seen.sources, texts)

    def _save(self, sources: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        steps = [[s.name, s.verb, s.target, s.recipe, s.inputs, s.outputs, s.after, s.on_demand] for s in self.steps.values()]
        cached = {
            "identity": self.identity(),
            "guards": self.guards,
            "sources": sources,
            "texts": texts,
            "targets": self.targets,
            "problems": self.problems,
            "groups": self.groups,
            "steps": steps,
        }
        try:
            write_whole(f"{STATE}/{RECIPES}", sealed(json.dumps(self._recipes, separators=(",", ":")).encode()))
            self._keep(cached)
        except OSError:
            pass  # a plan cache that cannot be written costs time only; what must be written says so itself

    def _keep(self, cached: Mapping[str, Any]) -> None:
        """Write the plan cache, but where a file that it was made from may have changed unseen. Raises OSError."""
        if self.settled:
            write_whole(f"{STATE}/{PLAN}", sealed(json.dumps(cached, separators=(",", ":")).encode()))


def _read_plan(folder: str) -> dict[str, Any] | None:
    """None where there is none that is whole."""
    try:
        with open(f"{folder}/{PLAN}", "rb") as file:
            found: dict[str, Any] = json.loads(unsealed(file.read()))
    except (OSError, ValueError):
        return None
    return found


def _place(identity: list[Any], texts: Mapping[str, str]) -> str:
    """Where a plan is kept that is not the last run's."""
    return f"{BEFORE}/{digest.tagged('plan', [identity, texts])}"


def _move(source: str, target: str) -> None:
    """Move a plan and its recipes. Of those of before the oldest go. Raises OSError."""
    os.makedirs(target, exist_ok=True)
    for name in (RECIPES, PLAN):
        os.replace(f"{source}/{name}", f"{target}/{name}")
    if source != STATE:
        remove_tree(source)
    for old in sorted((f"{BEFORE}/{name}" for name in os.listdir(BEFORE)), key=os.path.getmtime)[:-KEPT]:
        remove_tree(old)


class _Seen:
    """Finds what plans depend on, and notes the signature of every path that it looked at."""

    def __init__(self, project: Project) -> None:
        self._memo = project.memo
        self._known: dict[tuple[str, ...], Mapping[str, str]] = {}
        self._toolchains: dict[str, Versions] = {}
        self.guards: dict[str, Signature | None] = {}
        self.settled = True  # of what was looked at
        self.sources: dict[str, Any] = {}  # path of a lone model file -> what a plan takes of it
        self._looked: dict[str, ModelFacts | None] = {}  # source → its headers, where they had a say

    def guard(self, *paths: str) -> None:
        for path in paths:
            if self.guards.get(path, THERE) == THERE:
                start = time.time_ns()
                found = self.guards[path] = signature(path)
                self.settled &= not racy(found, start)

    def surroundings(self) -> "Surroundings":
        from edgebuild.load import preferred
        from edgebuild.plan import Surroundings

        for folder in (shipped.PACKAGE, *(shipped.folder(name) for name in ("schemas", "platforms", "templates"))):
            for path in _files(folder):
                if path.endswith((".py", ".yaml", ".json")):
                    self.guard(path)
        return Surroundings(
            toolchain=self._toolchain,
            isa=machine.isa(),
            machine=machine.measuring(),
            code=self._code,
            source=self._source,
            exists=self._exists,
            templates=self._templates,
            preferences=preferred(),
            facts=self._facts,
            signer=self._signer,
            program=self._program,
            wheels=self._wheels,
        )

    def _toolchain(self, needs: "Needs") -> "Versions":
        """Of this interpreter, where it has the packages that the backend names as its lock names them; else of the lock's environment.

        Whether that is there makes no difference: a build makes it.
        """
        from edgebuild import toolchain

        if needs.lock not in self._toolchains:
            self.guard(toolchain.file(needs.lock))
            lock = toolchain.read(needs.lock)
            here = lock is None or not lock.differences(self._versions(needs.packages))
            self._toolchains[needs.lock] = self._versions if lock is None or here else lock.versions
        return self._toolchains[needs.lock]

    def _versions(self, packages: tuple[str, ...]) -> Mapping[str, str]:
        from edgebuild import toolchain

        if packages not in self._known:
            self._known[packages] = toolchain.versions(packages)
            self.guard(*(path for path in toolchain.evidence(packages) if os.path.realpath(path) != os.getcwd()))
        return self._known[packages]

    def _code(self, module: str) -> str:
        path = os.path.join(shipped.PACKAGE, module.replace(".", os.sep))
        return self._memo.of(path + ".py" if os.path.exists(path + ".py") else os.path.join(path, "__init__.py"))

    def _source(self, target: "Target") -> "Found":
        from edgebuild import source, toolchain
        from edgebuild.errors import TargetError
        from edgebuild.target import parse_source

        named = parse_source(target.source)
        if named.kind == "local":
            self.guard(named.path)
        if named.kind == "package":
            self.guard(*toolchain.evidence((named.name,)))
        try:
            found = source.find(".", target.source, target.name, target.sha256)
        except (ValueError, OSError) as error:
            raise TargetError([target.problem("model.source", str(error))]) from error
        if named.kind == "local" and "model" in found.files:
            self.sources.setdefault(named.path, _listed(found))
        if "model" not in found.files and not named.remote:
            self.guard(*sorted({os.path.dirname(path) for path in found.files.values()}))
        elif named.kind == "package":
            self.guard(found.files["model"])
        return found

    def _facts(self, target: "Target", found: "Found") -> "ModelFacts | None":
        """What lies on this machine is looked at; what a fetch brings is not, though it be here: a plan is the same before and after."""
        from edgebuild.target import parse_source

        named = parse_source(target.source)
        if named.remote:
            return None
        self.guard(*found.files.values())
        if target.source not in self._looked:
            self._looked[target.source] = _facts_of(found)
        if named.path in self.sources:
            self.sources[named.path] = _listed(found, [self._looked[target.source]])
        return self._looked[target.source]

    def _exists(self, path: str) -> bool:
        there = os.path.isfile(path)
        self.guards.setdefault(path, THERE if there else None)
        return there

    def _signer(self, target: "Target", takes: "Takes") -> "Pair":
        from edgebuild import signing
        from edgebuild.bundles import programs
        from edgebuild.errors import TargetError

        try:
            pair = signing.chosen(target.sign, takes, os.environ.get(SIGN, ""))
        except ValueError as error:
            self.settled = False  # what mends it may be no file: a variable, or a token's library
            raise TargetError([target.problem("package.sign", str(error))]) from error
        self.guard(*signing.files(pair))
        if pair.in_token and (lacking := [name for name in takes.token if not self._program(name)]):
            message = f"{programs.missing(lacking, takes.token)}; {takes.what} is signed by it with a key in a token"
            raise TargetError([target.problem("package.sign", message)])
        return pair

    def _wheels(self, name: str) -> str:
        from edgebuild import toolchain

        self.guard(toolchain.file(name))
        lock = toolchain.read(name)
        return f"{lock.label} for {lock.interpreter}" if lock else toolchain.MISSING

    def _program(self, name: str) -> str:
        """A program, or a file that programs read. Where it may come to stand is guarded too: a bundle is proven further then."""
        import shutil

        places = [os.path.join(folder, name) for folder in os.get_exec_path()]  # of an absolute path, that path
        self.guard(*dict.fromkeys(places))
        found = name if os.path.isabs(name) and os.path.isfile(name) else shutil.which(name)
        return self._memo.of(found) if found else ""

    def _templates(self, kind: str) -> Mapping[str, str]:
        """Every template of a kind; a file of the project's own `templates/KIND/` takes the place of the shipped one."""
        found = {}
        for folder in (os.path.join(shipped.folder("templates"), kind), os.path.join("templates", kind)):
            self.guard(folder)
            for path in _files(folder):
                self.guard(os.path.dirname(path))
                found[f"template/{os.path.relpath(path, folder)}"] = path
        return dict(sorted(found.items()))


def _problems(names: list[str], failed: "Mapping[str, TargetError]") -> dict[str, str]:
    """Target name → its message; of several targets of one file it says which, unless all of them have the same."""
    same = len(failed) == len(names) and len({error.problems for error in failed.values()}) == 1
    if same:
        return {name: str(error) for name, error in failed.items()}
    return {name: "\n".join(f"{problem} (target {name})" for problem in error.problems) for name, error in failed.items()}


def _listed(found: "Found", looked: "Sequence[ModelFacts | None]" = ()) -> list[Any]:
    """What a plan takes of a source: where its headers had a say, a digest of them too."""
    return [dict(found.files), found.format, *(digest.tagged("facts", facts and facts.to_json()) for facts in looked)]


def _facts_of(found: "Found") -> "ModelFacts | None":
    """None where a build would refuse the source: then its own steps say so."""
    from edgebuild.errors import StepFailed
    from edgebuild.facts import facts_of

    try:
        return facts_of({role: Path(path) for role, path in found.files.items()})
    except (StepFailed, OSError):
        return None


def _text_files() -> list[str]:
    targets = [f"targets/{name}" for name in _listdir("targets") if name.endswith(".yaml") and not name.startswith(".")]
    return targets + [f"platforms/{name}" for name in _listdir("platforms")]


def _files(folder: str) -> list[str]:
    return sorted(
        os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if "__pycache__" not in where
    )


def _listdir(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
