"""Target and platform files → Target, checked: what a target is made of, and what no schema can say."""

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from edgebuild import matrix, shipped
from edgebuild.document import Document, Path, show
from edgebuild.errors import TargetError, did_you_mean, shown
from edgebuild.select import Preferences, preferences
from edgebuild.step import ACROSS
from edgebuild.target import Gate, Platform, Target, parse_source
from edgebuild.token import SCHEME
from edgebuild.units import SEMVER, duration, folded, name_problem, size

_LANGUAGE = ("kl_mean", "same_top", "perplexity_ratio")
_LABELLED = ("quality", "flip_rate")
_RUNNING = ("latency_ratio", "weights_ratio", "peak_memory", "consistency")
_LABELLED_TASKS = (
    "image-classification",
    "tabular-classification",
    "text-classification",
    "audio-classification",
    "voice-activity-detection",
)


def names(root: str) -> list[str]:
    """The names of a project's target files, `targets/*.yaml`, sorted. Raises TargetError where there is no such folder."""
    try:
        found = sorted(os.listdir(os.path.join(root, "targets")))
    except OSError as error:
        raise TargetError(
            ["targets/: no such folder here; go to a project's root, or make a project: edgebuild init DIR"]
        ) from error
    return [name[: -len(".yaml")] for name in found if name.endswith(".yaml") and not name.startswith(".")]


class Targets:
    """The targets that these files of a project describe; every target and platform file is read once.

    `files`: file's name → its targets' names, several where it has a `matrix`; `problems`: file's name → why it has none.
    """

    def __init__(self, root: str, files: Iterable[str]) -> None:
        self._root = root
        self._documents: dict[str, Document] = {}
        self._platforms: dict[str, Platform] = {}
        self._kinds: dict[str, frozenset[str]] = {}
        self.files: dict[str, list[str]] = {}
        self.problems = _name_problems(files)
        taken = {name: name for name in files}
        for file in files:
            if file in self.problems:
                continue
            try:
                found = _documents(root, file)
                if clash := [name for name in found if taken.setdefault(name, file) != file]:
                    other = f"targets/{taken[clash[0]]}.yaml"
                    message = f"its target {clash[0]} has the name of one that {other} gives; rename one of the two files"
                    raise TargetError([found[clash[0]].problem(("matrix",), message)])
            except TargetError as error:
                self.problems[file] = str(error)
                continue
            self.files[file] = list(found)
            self._documents |= found

    def target(self, name: str, version: str | None = None) -> Target:
        """One target, checked; `version` overrides `package.version`.

        Raises TargetError with every problem found, a line each: `FILE:LINE: KEY: what is wrong; what to do`.
        """
        document = self._documents[name]
        given = document.mapping()
        platform = self._platform(document, given["platform"])
        merged = _merge(platform.defaults, given)
        if version is not None:
            if not SEMVER.match(version):
                raise TargetError([f"package.version={show(version)}: must be a semantic version such as 1.2.0 (semver.org)"])
            merged = _merge(merged, {"package": {"version": version}})
        problems = _meaning(document, merged)
        if problems:
            raise TargetError(problems)
        return _target(self._root, name, document, platform, merged, self._signed_by(document, platform))

    def _signed_by(self, document: "Document", platform: Platform) -> frozenset[str]:
        """The kinds of bundles that the `package.sign` of a target is written for: its file may be for several, by a matrix.

        What stands in a platform is for bundles of its own kind.
        """
        if "sign" not in document.mapping().get("package", {}):
            return frozenset({_kind(platform.defaults)})
        if document.file not in self._kinds:
            found = set()
            for other in (one for one in self._documents.values() if one.file == document.file):
                try:
                    given = other.mapping()
                    found.add(_kind(_merge(self._platform(other, given["platform"]).defaults, given)))
                except TargetError:
                    continue  # that target says so itself
            self._kinds[document.file] = frozenset(found)
        return self._kinds[document.file]

    def _platform(self, document: "Document", name: str) -> Platform:
        if name not in self._platforms:
            try:
                self._platforms[name] = platform(self._root, name)
            except ValueError as error:
                raise TargetError([document.problem(("platform",), str(error))]) from error
        return self._platforms[name]


def _name_problems(files: Iterable[str]) -> dict[str, str]:
    """File name → why it may not be used, for those that may not."""
    problems: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in files:
        if name == ACROSS:
            problems[name] = f"targets/{name}.yaml: the file's name: {name} is where {ACROSS}:MODEL writes; rename it"
        elif problem := name_problem(name):
            problems[name] = f"targets/{shown(name)}.yaml: the file's name: {problem}; rename it"
        elif (other := first.setdefault(folded(name), name)) != name:
            problems[name] = (
                f"targets/{shown(name)}.yaml: the file's name differs from {shown(other)}.yaml in case or Unicode form only; rename one"
            )
    return problems


def _documents(root: str, file: str) -> dict[str, "Document"]:
    """Target name → its document: the file's own or, where it has a matrix, one for each combination. Raises TargetError.

    The schema speaks of keys and of single values: those of a matrix are checked where they stand, and the first
    combination for all.
    """
    document = Document(os.path.join(root, f"targets/{file}.yaml"), f"targets/{file}.yaml")
    given = document.mapping()
    if "matrix" not in given:
        document.check("target")
        return {file: document}
    document.check("target#/properties/matrix", "matrix")
    texts = {key: [document.text("matrix", key, at) for at in range(len(values))] for key, values in given["matrix"].items()}
    problems = [document.problem(path, message) for path, message in matrix.problems(file, given, texts)]
    if problems:
        raise TargetError(problems)
    variants = {matrix.target_name(file, texts, places): document.variant(places) for places in matrix.combinations(texts)}
    next(iter(variants.values())).check("target")
    return variants


def platform_names(root: str) -> list[str]:
    found = set(_yaml_stems(shipped.folder("platforms"))) | set(_yaml_stems(os.path.join(root, "platforms")))
    return sorted(found)


def platform_file(root: str, name: str) -> str | None:
    """The project's own platform file, else the built-in one, else None."""
    for folder in (os.path.join(root, "platforms"), shipped.folder("platforms")):
        path = os.path.join(folder, f"{name}.yaml")
        if os.path.isfile(path):
            return path
    return None


@cache
def tasks() -> tuple[str, ...]:
    """What model.task may be."""
    with open(os.path.join(shipped.folder("schemas"), "target.json"), encoding="utf-8") as file:
        return tuple(json.load(file)["properties"]["model"]["properties"]["task"]["enum"])


@cache
def preferred() -> Preferences:
    """What preferences.yaml says."""
    return preferences(Document(os.path.join(shipped.PACKAGE, "preferences.yaml"), "preferences.yaml").mapping())


@cache
def gate_defaults() -> dict[str, dict[str, Any]]:
    document = Document(os.path.join(shipped.PACKAGE, "gates.yaml"), "gates.yaml")
    value: dict[str, dict[str, Any]] = document.value
    return value


def default_metrics(task: str, data: bool) -> str:
    """Which row of gates.yaml a task takes: its own, `labels`, or `other` (always where there is no evaluation data)."""
    if not data:
        return "other"
    if task == "text-generation":
        return task
    return "labels" if task in _LABELLED_TASKS else "other"


# -- meaning: what a schema cannot say ------------------------------------------------------------------------------------
def _meaning(document: "Document", merged: Mapping[str, Any]) -> list[str]:
    problems = []
    model = merged["model"]
    task, source = model["task"], model["source"]
    try:
        kind = parse_source(source).kind
        if kind == "https" and "sha256" not in model:
            problems.append(
                document.problem(("model", "sha256"), "missing; a file from the network is taken only with its sha256")
            )
        if kind != "https" and "sha256" in model:
            problems.append(
                document.problem(("model", "sha256"), "is for https sources; remove it: other sources are known by content")
            )
    except ValueError as error:
        problems.append(document.problem(("model", "source"), f"{show(source)}: {error}"))
    metrics = set(_RUNNING) | {"cosine", "snr"}
    metrics |= set(_LANGUAGE) if task == "text-generation" else set(_LABELLED) if task in _LABELLED_TASKS else set()
    for metric, gate in merged.get("gates", {}).items():
        where = ("gates", metric)
        if metric not in metrics:
            problems.append(document.problem(where, f"is not measured for {task}; measured are: {', '.join(sorted(metrics))}"))
        elif metric in _LANGUAGE + _LABELLED and "evaluate" not in merged:
            problems.append(document.problem(where, "needs evaluation data; give evaluate.data, or gate cosine and snr"))
        if "min" in gate and "max" in gate and gate["min"] > gate["max"]:
            problems.append(document.problem(where, f"min {gate['min']} is above max {gate['max']}; nothing can pass"))
    quantities: tuple[Path, ...] = (
        ("package", "limits", "shell"),
        ("package", "limits", "weights"),
        ("limits", "memory"),
        ("limits", "time"),
        *(("limits", "estimates", str(step)) for step in merged.get("limits", {}).get("estimates", {})),
    )
    for key in quantities:
        value: Any = merged
        for part in key:
            value = value.get(part, {})
        if isinstance(value, str):
            try:
                (duration if key[-1] == "time" else size)(value)
            except ValueError as error:
                problems.append(document.problem(key, f"must be {error}, not {show(value)}"))
    version = merged.get("package", {}).get("version")
    if version is not None and not SEMVER.match(version):
        problems.append(
            document.problem(("package", "version"), f"must be a semantic version such as 1.2.0, not {show(version)}")
        )
    return problems


def _target(
    root: str,
    name: str,
    document: "Document",
    platform: Platform,
    merged: Mapping[str, Any],
    sign_kinds: frozenset[str],
) -> Target:
    package, limits, quantize = merged.get("package", {}), merged.get("limits", {}), dict(merged.get("quantize", {}))
    budget = package.get("limits", {})
    calibration = merged.get("calibration", {})
    evaluation = merged.get("evaluate", {}).get("data", "")
    task = merged["model"]["task"]
    gates = _merge(gate_defaults()[default_metrics(task, bool(evaluation))], merged.get("gates", {}))
    return Target(
        name=name,
        file=document.file,
        lines=_lines(document),
        description=merged.get("description", ""),
        default=merged.get("default", True),
        source=_source(root, merged["model"]["source"]),
        sha256=merged["model"].get("sha256", ""),
        state=merged["model"].get("state", {}),
        shape=merged["model"].get("shape", {}),
        task=task,
        platform=platform,
        framework=merged.get("framework", "auto"),
        prefer=merged.get("prefer", ""),
        scheme=quantize.pop("scheme", "none"),
        quantize=quantize,
        calibration=_normal(root, calibration.get("data", "")),
        calibration_samples=calibration.get("samples"),
        evaluation=_normal(root, evaluation),
        profile=merged.get("benchmark", {}).get("profile", "rapid"),
        gates={metric: Gate(**gate) for metric, gate in sorted(gates.items())},
        kind=_kind(merged),
        version=package.get("version", "0.0.0"),
        shell_limit=size(budget["shell"]) if "shell" in budget else None,
        weights_limit=size(budget["weights"]) if "weights" in budget else None,
        archive=package.get("archive", True),
        require_level=package.get("require_level", ""),
        sign=_sign(root, package.get("sign", {})),
        sign_kinds=sign_kinds,
        memory_limit=size(limits["memory"]) if "memory" in limits else None,
        estimates={step: size(amount) for step, amount in limits.get("estimates", {}).items()},
        time_limit=duration(limits.get("time", "6h")),
    )


def platform(root: str, name: str) -> Platform:
    """A project's own platform, else the built-in one. Raises ValueError where there is none, TargetError where its file is bad."""
    path = platform_file(root, name)
    if path is None:
        known = platform_names(root)
        raise ValueError(f'no platform "{name}"; there are: {", ".join(known)}.{did_you_mean(name, known)}')
    own = os.path.join(root, "platforms")
    file = f"platforms/{name}.yaml" if os.path.dirname(path) == own else f"edgebuild/platforms/{name}.yaml"
    document = Document(path, file)
    document.check("platform")
    value = document.mapping()
    benchmark = dict(value.get("benchmark", {}))
    not_measured = benchmark.pop("not_measured", "")
    defaults: dict[str, Any] = {
        key: value[key] for key in ("framework", "prefer", "quantize", "gates", "package") if key in value
    }
    if benchmark:
        defaults["benchmark"] = benchmark
    facts = value.get("facts", {})
    try:
        memory = size(str(facts["memory"])) if "memory" in facts else None
    except ValueError as error:
        message = f"must be {error}, not {show(facts['memory'])}"
        raise TargetError([document.problem(("facts", "memory"), message)]) from error
    return Platform(
        name=name,
        description=value.get("description", ""),
        hardware=value.get("hardware", "any"),
        memory=memory,
        not_measured=not_measured,
        defaults=defaults,
        facts=facts,
        file=file,
        lines=_lines(document),
    )


def _kind(given: Mapping[str, Any]) -> str:
    kind: str = given.get("package", {}).get("kind", "folder")
    return kind


def _lines(document: "Document") -> dict[str, int]:
    return {".".join(map(str, path)): line for path, line in document.lines.items()}


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, map by map: built-in ← platform ← target."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _source(root: str, text: str) -> str:
    return _normal(root, text) if parse_source(text).kind == "local" else text


def _sign(root: str, named: Mapping[str, str]) -> dict[str, str]:
    token = named.get("key", "").startswith(SCHEME)
    return {key: value if key == "pin_env" or token else _normal(root, value) for key, value in named.items()}


def _normal(root: str, path: str) -> str:
    """Relative to the project where the path lies in it (so that a moved checkout stays the same), else absolute."""
    if not path:
        return ""
    root = os.path.abspath(root)
    whole = os.path.normpath(os.path.join(root, path))
    inside = os.path.relpath(whole, root)
    return whole if inside == os.pardir or inside.startswith(os.pardir + os.sep) else inside


def _yaml_stems(folder: str) -> list[str]:
    try:
        return [name[: -len(".yaml")] for name in os.listdir(folder) if name.endswith(".yaml")]
    except OSError:
        return []
