"""Target and platform files → Target, checked. The only module that knows yaml and jsonschema.

YAML is read from parser events, in one pass: aliases, anchors, tags, duplicate keys, deep nesting and scalars that YAML
1.1 and 1.2 read differently are refused before anything is built from them (a 200 kB file of '[' crashes libyaml's
loader; a 306-byte alias bomb takes gigabytes).
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import jsonschema
import referencing.jsonschema
import yaml

from edgebuild import matrix, shipped
from edgebuild.errors import TargetError, did_you_mean, shown
from edgebuild.select import Preferences, preferences
from edgebuild.step import ACROSS
from edgebuild.target import Gate, Platform, Target, parse_source
from edgebuild.units import SEMVER, duration, folded, name_problem, size

MAX_BYTES, MAX_DEPTH, MAX_NODES = 256 * 1024, 32, 20_000
LONGEST = 100  # characters; what looks like a number that far is one: the patterns take the square of a length
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})\Z")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+\Z")
_AMBIGUOUS = re.compile(
    r"""( y|yes|n|no|on|off|true|false|null            # booleans of YAML 1.1, in any case
        | [-+]?0[0-9_]+ | [-+]?0[xob][0-9a-f_]+        # octal, hexadecimal, binary
        | [-+]?[0-9_]*\.?[0-9_]*e[-+]?[0-9]+           # exponents
        | [-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?        # sixties
        | [-+]?(\.[0-9]+ | [0-9]+\.) | \+[0-9][0-9.]*  # numbers that lack a digit, or with a plus
        | [-+]?[0-9][0-9_]*_[0-9_]* | [0-9]{20,}       # 1_000, and what no 64-bit integer holds
        | [-+]?\.(inf|nan)
        | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([t\ ].*)?     # dates
    )\Z""",
    re.VERBOSE | re.IGNORECASE,
)
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
Path = tuple[str | int, ...]


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
        self._documents: dict[str, _Document] = {}
        self._platforms: dict[str, Platform] = {}
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
                raise TargetError([f"package.version={_show(version)}: must be a semantic version such as 1.2.0 (semver.org)"])
            merged = _merge(merged, {"package": {"version": version}})
        problems = _meaning(document, merged)
        if problems:
            raise TargetError(problems)
        return _target(self._root, name, document, platform, merged)

    def _platform(self, document: "_Document", name: str) -> Platform:
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


def _documents(root: str, file: str) -> dict[str, "_Document"]:
    """Target name → its document: the file's own or, where it has a matrix, one for each combination. Raises TargetError.

    The schema speaks of keys and of single values: those of a matrix are checked where they stand, and the first
    combination for all.
    """
    document = _Document(os.path.join(root, f"targets/{file}.yaml"), f"targets/{file}.yaml")
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
    return preferences(_Document(os.path.join(shipped.PACKAGE, "preferences.yaml"), "preferences.yaml").mapping())


@cache
def gate_defaults() -> dict[str, dict[str, Any]]:
    document = _Document(os.path.join(shipped.PACKAGE, "gates.yaml"), "gates.yaml")
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
def _meaning(document: "_Document", merged: Mapping[str, Any]) -> list[str]:
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
        problems.append(document.problem(("model", "source"), f"{_show(source)}: {error}"))
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
                problems.append(document.problem(key, f"must be {error}, not {_show(value)}"))
    version = merged.get("package", {}).get("version")
    if version is not None and not SEMVER.match(version):
        problems.append(
            document.problem(("package", "version"), f"must be a semantic version such as 1.2.0, not {_show(version)}")
        )
    return problems


def _target(root: str, name: str, document: "_Document", platform: Platform, merged: Mapping[str, Any]) -> Target:
    package, limits, quantize = merged.get("package", {}), merged.get("limits", {}), dict(merged.get("quantize", {}))
    budget = package.get("limits", {})
    calibration = merged.get("calibration", {})
    evaluation = merged.get("evaluate", {}).get("data", "")
    task = merged["model"]["task"]
    gates = _merge(gate_defaults()[default_metrics(task, bool(evaluation))], merged.get("gates", {}))
    return Target(
        name=name,
        file=document.file,
        lines={".".join(map(str, path)): line for path, line in document.lines.items()},
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
        kind=package.get("kind", "folder"),
        version=package.get("version", "0.0.0"),
        shell_limit=size(budget["shell"]) if "shell" in budget else None,
        weights_limit=size(budget["weights"]) if "weights" in budget else None,
        archive=package.get("archive", True),
        require_level=package.get("require_level", ""),
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
    document = _Document(path, file)
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
        message = f"must be {error}, not {_show(facts['memory'])}"
        raise TargetError([document.problem(("facts", "memory"), message)]) from error
    return Platform(
        name=name,
        description=value.get("description", ""),
        hardware=value.get("hardware", "any"),
        memory=memory,
        not_measured=not_measured,
        defaults=defaults,
        facts=facts,
    )


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, map by map: built-in ← platform ← target."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _source(root: str, text: str) -> str:
    return _normal(root, text) if parse_source(text).kind == "local" else text


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


# -- YAML and schema ------------------------------------------------------------------------------------------------------
class _Document:
    """A YAML file: its value, and the line on which each key stands."""

    def __init__(self, path: str, file: str) -> None:
        self.file = file
        self.lines: dict[Path, int] = {}
        self._raw: dict[Path, str] = {}
        self.value: Any = self._build(_text(path, file))

    def problem(self, path: Path, message: str) -> str:
        """`FILE:LINE: KEY: message`, with the line of the nearest key that is there."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        line = f":{self.lines[known]}" if known in self.lines else ""
        key = ".".join(shown(str(part)) for part in path)
        return f"{self.file}{line}: {key + ': ' if key else ''}{message}"

    def mapping(self) -> dict[str, Any]:
        """The value as a map. Raises TargetError where it is none."""
        if not isinstance(self.value, dict):
            raise TargetError(
                [f"{self.file}: must hold a map of keys, such as `model:` and `platform:`; see the README's example"]
            )
        return self.value

    def text(self, *path: str | int) -> str:
        """A scalar as it is written, without quotes."""
        value: Any = self.value
        for part in path:
            value = value[part]
        return self._raw.get(path, str(value))

    def variant(self, places: Mapping[str, int]) -> "_Document":
        """The document that one choice of a matrix stands for; its values keep the lines on which they stand."""
        made = copy.copy(self)
        made.lines = {path: line for path, line in self.lines.items() if len(path) < 2 or path[0] != "matrix"}
        made._raw = dict(self._raw)
        made.value = matrix.document(self.mapping(), places)
        for key, place in places.items():
            value, path = ("matrix", key, place), tuple(key.split("."))
            for length in range(1, len(path)):
                made.lines.setdefault(path[:length], self.lines[value])
            made.lines[path] = self.lines[value]
            if value in self._raw:
                made._raw[path] = self._raw[value]
        return made

    def check(self, schema: str, key: str = "") -> None:
        """Raises TargetError with every way in which the value (or what it has at `key`) is not what the schema says."""
        value = self.mapping()
        above = (key,) if key else ()
        found = _validator(schema).iter_errors(value[key] if key else value)
        errors = sorted(found, key=lambda error: self.lines.get((*above, *error.absolute_path), 0))
        problems = list(dict.fromkeys(problem for error in errors for problem in self._explain(error, above)))
        if problems:
            raise TargetError(problems)

    def _explain(self, error: Any, above: Path) -> list[str]:
        path: Path = (*above, *error.absolute_path)
        schema, value = error.schema, error.instance
        expected = schema.get("expected", "")
        if error.validator == "additionalProperties":
            known = list(schema.get("properties", ()))
            takes = schema.get("known", f"known here: {', '.join(known)}")
            unknown = [key for key in value if key not in known]
            return [self.problem((*path, key), f"unknown key; {takes}.{did_you_mean(key, known)}") for key in unknown]
        if error.validator == "required":
            missing = [key for key in error.validator_value if key not in value]
            return [self.problem((*path, key), "missing; add it" + _hint(schema, key)) for key in missing]
        if error.validator == "enum":
            choices = [str(choice) for choice in error.validator_value]
            one_of = f"is {_show(value)}, but must be one of: {', '.join(choices)}."
            return [self.problem(path, one_of + (did_you_mean(value, choices) if isinstance(value, str) else ""))]
        if error.validator == "minProperties" and not expected:
            return [self.problem(path, "is empty; give min, max, required or waive")]
        raw = self._raw.get(path)
        fits = raw is not None and re.search(schema.get("pattern", ""), raw) is not None  # quotes alone would mend it
        raw = raw and shown(raw)
        if error.validator == "type" and "string" in str(error.validator_value) and fits and not isinstance(value, str):
            what = "a boolean" if isinstance(value, bool) else "a number"
            return [self.problem(path, f'{raw} is {what}; where text is meant, write it in quotes: "{raw}"')]
        if error.validator == "type" and isinstance(value, str) and raw is None and "number" in str(error.validator_value):
            return [self.problem(path, f"is text, but must be {expected or 'a number'}; write it without quotes")]
        if raw and not isinstance(value, str) and expected and "string" in str(schema.get("type")):
            return [self.problem(path, f"must be {expected}, in quotes where YAML would take it for a number; {raw} is one")]
        kinds = {
            "object": "a map of keys",
            "array": "a list",
            "boolean": "true or false",
            "string": "text",
            "integer": "a whole number",
        }
        return [
            self.problem(
                path, f"must be {expected or kinds.get(str(error.validator_value), error.validator_value)}, not {_show(value)}"
            )
        ]

    def _build(self, text: str) -> Any:
        """The document's value, from parser events. Raises TargetError."""
        stack: list[tuple[Any, Path, list[str]]] = []  # (container, its path, the key that waits for its value)
        documents, nodes, result = 0, 0, None
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                line = event.start_mark.line + 1 if event.start_mark else 1
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        raise self._refuse(line, "a second document begins here; one file holds one target")
                    continue
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    raise self._refuse(line, "anchors (&) and aliases (*) are not allowed; write the value out")
                if isinstance(event, yaml.CollectionEndEvent):
                    stack.pop()
                    continue
                if not isinstance(event, yaml.NodeEvent):
                    continue
                nodes += 1
                if nodes > MAX_NODES:
                    raise self._refuse(line, f"more than {MAX_NODES} values; a target needs a few dozen")
                if tag := getattr(event, "tag", None):
                    raise self._refuse(line, f"tags such as {_show(tag)} are not allowed; write the plain value")
                if len(stack) >= MAX_DEPTH:
                    raise self._refuse(line, f"nested deeper than {MAX_DEPTH} levels")
                value = self._place(event, stack, line)
                if not stack and result is None:
                    result = value
                if isinstance(event, yaml.CollectionStartEvent):
                    stack.append((value, self._path, []))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            if "nesting depth" in str(error.problem):  # libyaml's own limit, where it has one
                raise self._refuse(line, f"nested deeper than {MAX_DEPTH} levels") from error
            raise self._refuse(
                line, f"not valid YAML: {error.problem or error.context}; check indentation, colons and quotes"
            ) from error
        except yaml.YAMLError as error:  # the reader: characters that YAML does not allow
            raise TargetError(
                [f"{self.file}: not valid YAML: it holds a character that YAML does not allow (a control character?)"]
            ) from error
        return result

    def _place(self, event: Any, stack: list[tuple[Any, Path, list[str]]], line: int) -> Any:
        """Read one node and put it where it belongs: as a key, under the key that waits, or into a list."""
        container, above, waiting = stack[-1] if stack else (None, (), [])
        if isinstance(container, dict) and not waiting:
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refuse(line, "a key must be a word, not a list or map")
            if event.value in container:
                raise self._refuse(line, f"the key {_show(event.value)} stands twice in one map; remove one")
            if event.value == "<<":
                raise self._refuse(line, "merge keys (<<) are not allowed; write the keys out")
            waiting.append(event.value)
            self.lines[(*above, event.value)] = line
            return event.value
        path: Path = above
        if isinstance(container, dict):
            path = (*above, waiting[0])
        elif isinstance(container, list):
            path = (*above, len(container))
        self._path = path
        self.lines.setdefault(path, line)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = event.value
            if event.implicit[0]:  # plain, not quoted
                value = self._scalar(event.value, path, line)
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if isinstance(container, dict):
            container[waiting.pop()] = value
        elif isinstance(container, list):
            container.append(value)
        return value

    def _scalar(self, text: str, path: Path, line: int) -> Any:
        """A plain scalar is what it looks like; what YAML versions read differently is refused."""
        if text in ("true", "false"):
            self._raw[path] = text
            return text == "true"
        if text in ("", "~", "null"):
            return None
        if _INTEGER.match(text):
            self._raw[path] = text
            return int(text)
        if _FLOAT.match(text):
            self._raw[path] = text
            return float(text)
        if _AMBIGUOUS.match(text[:LONGEST]):
            key, text = ".".join(shown(str(part)) for part in path), shown(text)
            raise self._refuse(
                line,
                f'{key}: YAML versions read {text} differently; where text is meant, write it in quotes: "{text}"; else write a plain number, true or false',
            )
        return text

    def _refuse(self, line: int, message: str) -> TargetError:
        return TargetError([f"{self.file}:{line}: {message}"])


def _text(path: str, file: str) -> str:
    try:
        with open(path, "rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise TargetError([f"{file}: cannot be read: {error.strerror}"]) from error
    if len(data) > MAX_BYTES:
        raise TargetError([f"{file}: larger than 256 KiB; a target needs a few hundred bytes"])
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise TargetError([f"{file}: begins with a byte-order mark; save it as UTF-8 without one"])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TargetError([f"{file}:{line}: not UTF-8 text; save it as UTF-8"]) from error


@cache
def _validator(schema: str) -> Any:
    """The validator of `SCHEMA` or `SCHEMA#POINTER`. Its registry holds our own schemas and fetches nothing."""
    registry: Any = referencing.Registry()
    for name in ("target", "platform"):
        with open(os.path.join(shipped.folder("schemas"), f"{name}.json"), encoding="utf-8") as file:
            loaded = json.load(file)
        del loaded["$schema"]  # it would bring back jsonschema's own validator of that draft
        registry = registry.with_resource(loaded["$id"], referencing.jsonschema.DRAFT202012.create_resource(loaded))
    name, _, pointer = schema.partition("#")
    plain = jsonschema.Draft202012Validator
    whole = plain.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)  # 8.0 samples are none
    strict = jsonschema.validators.extend(plain, {"pattern": _pattern}, type_checker=whole)  # type: ignore[no-untyped-call]
    return strict({"$ref": f"urn:edgebuild:{name}:1#{pointer}"}, registry=registry)


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """As JSON Schema means it: in Python `$` also matches before a line break at the end."""
    if validator.is_type(value, "string") and not re.search(re.sub(r"\$\Z", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"does not match {pattern}")


def _hint(schema: Mapping[str, Any], key: str) -> str:
    expected = schema.get("properties", {}).get(key, {}).get("expected", "")
    return f": {expected}" if expected else ""


def _show(value: Any) -> str:
    """A value in a message: one line, ASCII, never long."""
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
