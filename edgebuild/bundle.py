"""The `package` step: an artifact, a golden example and rendered templates become a folder for a device's tools, and its archive.

The only module that knows jinja2. A bundle's bytes depend on artifact, templates and parameters; never on time, place or umask.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgebuild import digest, machine
from edgebuild.backend import Backend
from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome
from edgebuild.units import SEMVER, folded, human, name_problem

if TYPE_CHECKING:
    import jinja2

MANIFEST = "manifest.json"
EPOCH = 315532800  # 1980-01-01: the earliest time that every archive format can hold
BLOCK = 1 << 20  # bytes read at once
TIMEOUT = 900  # seconds for a bundle's own self-test
LEVELS = ("L0", "L1", "L2", "L3", "L4")  # rendered, syntax, semantics, taken by its real tool, ran as the reference does


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """Where the artifact lies in a bundle. `files`: path in the bundle → file of the artifact."""

    files: Mapping[str, Path]
    model: str  # the path that the backend opens
    golden: str  # the path of golden.json


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """How far a bundle is proven, one of LEVELS; by which tools, name → version; and why no further."""

    level: str
    tools: Mapping[str, str]
    why_not_higher: str = ""


class BundleKind(Protocol):
    CODE: Sequence[str]  # modules below edgebuild whose text is in the package step's key
    COPIES: int  # how many times a bundle holds the weights, in one format or another

    def refuse(self, framework: str, task: str) -> str:
        """Why it cannot hold such a model, in one sentence, else empty; pure."""

    def payload(self, model: Path, module: str) -> Payload:
        """The artifact's place in the bundle; reads names alone. Raises StepFailed."""

    def values(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """What its templates may name beside the common values, from the platform's facts. Raises StepFailed."""

    def make(self, out: Path) -> Mapping[str, bool]:
        """Further files, made from the model in place; → path in the bundle: whether it is weights. Raises StepFailed."""

    def prove(self, out: Path, runs: Callable[[], str]) -> Proof:
        """Check a finished bundle. `runs` holds its model against the golden example, and names the runtime. Raises StepFailed."""


class Word(str):
    """Text of letters, digits and `.` `_` `+` `-`: needs no escaping where a format has no quotes."""


class Identifier(Word):
    """A name in code: stands bare."""


class Token(str):
    """A whole token of the output's language, checked by whoever made it: stands as it is."""


def run(action: Action, backend_name: str, backend: Backend, kind: BundleKind) -> Outcome:
    """Outputs `bundle`, `report` and, where it is asked for, `archive`. Raises StepFailed."""
    from edgebuild import golden

    params, out, model = action.params, action.outputs["bundle"], action.inputs["model"]
    values = {**_common(action, backend_name), **kind.values(params["platform"]["facts"])}
    payload = kind.payload(model, values["module"])
    _budget("weights", sum(path.stat().st_size for path in payload.files.values()), params["limits"])
    example = golden.make(backend, model)
    values |= _of_example(example)
    check_values(values)
    files = _Files(out)
    for place, source in sorted(payload.files.items()):
        files.copy(place, source)
    made = files.adopt(kind.make(out))
    weights = sum((out / place).stat().st_size for place in (*payload.files, *made))
    values |= {"weights": human(weights), "weights_bytes": weights}
    files.write(payload.golden, golden.dumps(example).encode())
    for name in values["licences"]:
        files.copy(f"licences/{name}", action.inputs[f"licence/{name}"])
    _render_all(action, backend_name, values, files, weights)
    named = {key: params[key] for key in ("name", "version", "kind")}
    count = write_manifest(out, {**named, "framework": backend_name, "platform": params["platform"]["name"]})
    proof = kind.prove(out, lambda: golden.hold(example, backend, out / payload.model))
    if problems := verify(out):
        raise StepFailed(f"checking the bundle changed it: {problems[0]}; this is a fault of edgebuild or of the runtime")
    return _finish(action, proof, weights, count)


def _finish(action: Action, proof: Proof, weights: int, count: int) -> Outcome:
    params, out = action.params, action.outputs["bundle"]
    total = sum(path.stat().st_size for path in walk(out))
    _budget("weights", weights, params["limits"])
    _budget("shell", total - weights, params["limits"])
    required = params.get("require_level") or LEVELS[0]
    if LEVELS.index(proof.level) < LEVELS.index(required):
        raise StepFailed(f"proven to {proof.level}, but package.require_level is {required}: {proof.why_not_higher}")
    if "archive" in action.outputs:
        archive(out, params["name"], action.outputs["archive"])
    report = {
        "kind": params["kind"],
        "level": proof.level,
        "tools": dict(proof.tools),
        "why_not_higher": proof.why_not_higher,
        "files": count,
        "bytes": total,
        "weights_bytes": weights,
        "shell_bytes": total - weights,
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sizes = f"weights {human(weights)}, the rest {human(total - weights)}"
    return Outcome(summary=f"{params['kind']} bundle, {count} files, {sizes}, proven to {proof.level}")


def _budget(part: str, size: int, limits: Mapping[str, int | None]) -> None:
    limit = limits[part]
    if limit is None or size <= limit:
        return
    found, allowed = human(size), human(limit)
    if found == allowed:
        found, allowed = f"{size:,} bytes", f"{limit:,} bytes"
    if part == "weights":
        raise StepFailed(
            f"weights {found} exceed package.limits.weights {allowed}: choose a smaller scheme or model, or raise the limit"
        )
    raise StepFailed(
        f"the files around the weights, {found}, exceed package.limits.shell {allowed}: leave templates out, or raise the limit"
    )


def lay(model: Path, place: str) -> dict[str, Path]:
    """An artifact's files by their paths in a bundle: a file at `place`, a folder's files below it. Raises StepFailed for a link."""
    found = (
        {place: model} if not model.is_dir() else {f"{place}/{path.relative_to(model).as_posix()}": path for path in walk(model)}
    )
    for path in found.values():
        _plain_file(path)
    return found


def self_test(out: Path, script: str) -> dict[str, Any]:
    """Run a bundle's own Python self-test in a process of its own; → the evidence that it prints last. Raises StepFailed."""
    try:
        done = subprocess.run(
            [sys.executable, "-B", script], cwd=out, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"the bundle's own self-test {script} took longer than {TIMEOUT} s") from error
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    if done.returncode:
        lines += done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise StepFailed(f"the bundle's own self-test {script} fails: {' | '.join(lines[-3:])[:500]}")
    try:
        evidence: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise StepFailed(f"the bundle's own self-test {script} prints no evidence; its last line must be JSON") from error
    return evidence


# -- values ---------------------------------------------------------------------------------------------------------------
def _common(action: Action, backend_name: str) -> dict[str, Any]:
    """What every template may name."""
    params = action.params
    platform, limits = params["platform"], params["limits"]
    if problem := name_problem(params["name"]):
        raise StepFailed(f"name: {params['name']!r} names no bundle: {problem}")
    if not SEMVER.match(params["version"]):
        raise StepFailed(f"version: {params['version']!r} is no semantic version (semver.org), such as 1.2.0")
    words = {key: params[key] for key in ("name", "version", "task", "scheme", "kind")} | {
        "framework": backend_name,
        "platform": platform["name"],
    }
    return {
        **{key: word(key, text) for key, text in words.items()},
        "module": identifier(params["name"]),
        "module_name": Word(identifier(params["name"])),
        "description": params["description"],
        "platform_description": platform["description"],
        "facts": dict(platform["facts"]),
        "weights_limit": _limit(limits["weights"]),
        "shell_limit": _limit(limits["shell"]),
        "licences": sorted(role.removeprefix("licence/") for role in action.inputs if role.startswith("licence/")),
    }


def _of_example(example: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {
        key: [
            {"name": one["name"], "dtype": one["dtype"], "shape": " × ".join(map(str, one["shape"]))}
            for one in example.get(key, ())
        ]
        for key in ("inputs", "outputs")
    }
    return {**shapes, "runtime": example["runtime"], "tolerance": example["tolerance"]}


def _limit(size: int | None) -> str:
    return human(size) if size is not None else "no limit"


def word(key: str, text: str) -> Word:
    """Raises StepFailed where `text` has other characters than a word may have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text):
        raise StepFailed(f"{key}: {text!r} may hold letters, digits and . _ + - alone")
    return Word(text)


def identifier(name: str) -> Identifier:
    """A name for code, in Swift and most other languages: ios-phi3 → IosPhi3Model."""
    parts = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", name))
    return Identifier(f"{'M' if parts[:1].isdigit() else ''}{parts}Model")


def check_values(value: Any, key: str = "") -> None:
    """Refuse, anywhere in `value`, text that no line of a file should hold. Raises StepFailed naming the value's key."""
    if isinstance(value, Mapping):
        for inner, one in value.items():
            check_values(str(inner), f"{key}, a key")
            check_values(one, f"{key}.{inner}" if key else str(inner))
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            check_values(one, f"{key}[{index}]")
    elif isinstance(value, str):
        for character in value:
            if _forbidden(character):
                name = unicodedata.name(character, "a control character")
                raise StepFailed(f"{key!r} holds U+{ord(character):04X} ({name}), which text for templates may not; remove it")


def _forbidden(character: str) -> bool:
    """Controls, line ends, lone surrogates, non-characters, and what is invisible or turns the direction of text.

    The zero-width joiners stay: scripts of India and emoji need them.
    """
    code = ord(character)
    if code in (0x200C, 0x200D):
        return False
    return (
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    )


# -- templates --------------------------------------------------------------------------------------------------------------
def _json(text: str) -> str:
    """A string literal of JSON, and of JavaScript, Python, YAML and TOML, which all take its escapes."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")  # never "</script>" where a page holds it


def _swift(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'  # "\\(" begins no interpolation


def _xml(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(character, entity)
    return text


def _markdown(text: str) -> str:
    """Inline text that CommonMark and GitHub show as it is."""
    text = re.sub(r"[\\`*_{}\[\]()#+!|<>&~$^=\"@]", r"\\\g<0>", text.strip())
    text = re.sub(r"^(\d+)([.])(?=\s|$)", r"\1\\\2", re.sub(r"^-", r"\\-", text))
    return re.sub(r"(?i)(?<=www)\.|:(?=//)", r"\\\g<0>", text)


def _plain(text: str) -> str:
    return text


# Suffix of the output file → how it writes text. A format that is missing here has no templates.
_TEXT: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys((".json", ".js", ".mjs", ".py", ".yaml", ".yml", ".toml"), _json),
    **dict.fromkeys((".xml", ".plist", ".xcprivacy"), _xml),
    ".swift": _swift,
    ".md": _markdown,
    ".txt": _plain,
}
_CODE = (".swift", ".js", ".mjs", ".py")  # where an identifier stands bare
_TRUTH: Mapping[str, tuple[str, str]] = {
    ".py": ("False", "True"),
    **dict.fromkeys((".plist", ".xcprivacy"), ("<false/>", "<true/>")),
}


def finalize(suffix: str) -> Callable[[Any], str]:
    """What turns a placeholder's value into one whole token of a file with this suffix. It raises StepFailed or UndefinedError."""
    if suffix not in _TEXT:
        raise StepFailed(
            f"edgebuild knows no way to write values into such a file ({suffix or 'no suffix'}); it has: {', '.join(sorted(_TEXT))}"
        )

    def token(value: Any) -> str:
        if isinstance(value, bool):
            return _TRUTH.get(suffix, ("false", "true"))[value]
        if isinstance(value, int):
            return str(value)
        if isinstance(value, float) and math.isfinite(value):
            return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML wants the point
        if isinstance(value, Token) or (isinstance(value, Identifier if suffix in _CODE else Word) and suffix in (*_CODE, ".md")):
            return str(value)
        if isinstance(value, str):
            return _TEXT[suffix](str(value))
        str(value)  # an undefined name says so here
        raise StepFailed(f"a placeholder's value is {value!r}; text, numbers, true and false can be written")

    return token


def render(source: str, rel: str, values: Mapping[str, Any]) -> str:
    """A template's text, filled in. `rel`: its path, whose suffix (without `.j2`) is the output's format. Raises StepFailed."""
    import jinja2

    try:
        return _environment(finalize(os.path.splitext(rel.removesuffix(".j2"))[1])).from_string(source).render(values)
    except StepFailed as error:
        raise StepFailed(f"template {rel}: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise StepFailed(f"template {rel}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template may divide by zero, add text to numbers, …
        raise StepFailed(f"template {rel}: {type(error).__name__}: {str(error)[:200]}") from error


def _environment(token: Callable[[Any], str]) -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=token,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.clear()  # lipsum is random, and nothing else is needed
    del environment.filters["random"]
    return environment


def _templates(inputs: Mapping[str, Path], backend_name: str) -> list[tuple[str, Path]]:
    """(path in the bundle, with `.j2` and `__name__`; file). What lies in a folder `for-NAME-NAME/` is for those frameworks alone."""
    chosen = {}
    for role, path in inputs.items():
        kind, _, rel = role.partition("/")
        first, _, rest = rel.partition("/")
        if kind == "template" and (not first.startswith("for-") or backend_name in first.split("-")[1:]):
            chosen[rest if first.startswith("for-") else rel] = path
    return sorted(chosen.items(), key=lambda item: (item[0] == "README.md.j2", item[0]))


def _render_all(action: Action, backend_name: str, values: Mapping[str, Any], files: _Files, weights: int) -> None:
    """Every template to its place, the README last: it states how much the others take."""
    for rel, path in _templates(action.inputs, backend_name):
        place = rel.removesuffix(".j2").replace("__name__", values["module"])
        if not rel.endswith(".j2"):
            files.copy(place, path, script=True)
            continue
        shell = sum(found.stat().st_size for found in walk(files.root)) - weights
        try:
            source = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise StepFailed(f"template {rel} is no UTF-8 text: byte {error.start}; save it as UTF-8") from error
        files.write(place, render(source, rel, {**values, "shell": human(shell), "shell_bytes": shell}).encode())


# -- files ------------------------------------------------------------------------------------------------------------------
class _Files:
    """Writes a bundle's files, no path twice, with the modes that bundles have whatever the umask."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._taken = {folded(MANIFEST): MANIFEST}
        root.mkdir()
        root.chmod(0o755)

    def adopt(self, made: Mapping[str, bool]) -> list[str]:
        """Files that lie in the bundle already; → those that are weights."""
        for place in made:
            self._claim(place)
            _mode(self.root / place, script=False)
        return [place for place, weights in made.items() if weights]

    def copy(self, place: str, source: Path, script: bool = False) -> None:
        """Copied without being held in memory. Raises StepFailed for a link or anything else that is no plain file."""
        _plain_file(source)
        target = self._place(place)
        shutil.copyfile(source, target)
        _mode(target, script)

    def write(self, place: str, data: bytes) -> None:
        target = self._place(place)
        target.write_bytes(data)
        _mode(target, script=True)

    def _claim(self, place: str) -> None:
        """Raises StepFailed for a path that leaves the bundle or that another one needs, capitals or not."""
        check_values(place, "the name of a file")
        parts = place.split("/")
        if "\\" in place or any(part in ("", ".", "..") for part in parts):
            raise StepFailed(f"{place!r} is no path inside a bundle")
        for folder in ("/".join(parts[:length]) + "/" for length in range(1, len(parts))):
            if (other := self._taken.setdefault(folded(folder[:-1]), folder)) != folder:
                raise StepFailed(f"{other} and {place} want the same place in the bundle; rename the template or the file")
        if other := self._taken.get(folded(place), ""):
            raise StepFailed(f"{other} and {place} want the same place in the bundle; rename the template or the file")
        self._taken[folded(place)] = place

    def _place(self, place: str) -> Path:
        self._claim(place)
        folder = self.root
        for part in place.split("/")[:-1]:
            folder /= part
            if not folder.is_dir():
                folder.mkdir()
                folder.chmod(0o755)
        return self.root / place


def _plain_file(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise StepFailed(f"{path.name} is a link or no plain file; put the file itself in its place")


def _mode(path: Path, script: bool) -> None:
    with path.open("rb") as file:
        path.chmod(0o755 if script and file.read(2) == b"#!" else 0o644)


def walk(folder: Path) -> list[Path]:
    """Everything below `folder` that is no folder, links to folders too, sorted by path as text."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name) for name in (*names, *links)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def write_manifest(folder: Path, about: Mapping[str, Any]) -> int:
    """manifest.json: what the bundle is, and every other file; → how many files there are, itself included."""
    entries = []
    for path in walk(folder):
        found = path.lstat()
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        sha256 = digest.of_file(str(path))
        entries.append({"path": path.relative_to(folder).as_posix(), "sha256": sha256, "size": found.st_size, "mode": mode})
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    head = json.dumps({"edgebuild": 1, **about, "isa": machine.isa()}, indent=1, ensure_ascii=False).removesuffix("\n}")
    target = folder / MANIFEST
    target.write_text(f'{head},\n "files": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    target.chmod(0o644)
    return len(entries) + 1


def verify(folder: Path) -> list[str]:
    """What differs from the bundle's manifest, a sentence each: files missing, added, changed, linked, of another mode."""
    try:
        if (folder / MANIFEST).is_symlink():
            return [f"{MANIFEST}: is a link"]
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {entry["path"]: (entry["sha256"], entry["size"], entry["mode"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{MANIFEST}: is missing or cannot be read ({type(error).__name__})"]
    problems = [] if len(listed) == len(entries) else [f"{MANIFEST}: lists a file twice"]
    there = {path.relative_to(folder).as_posix(): path for path in walk(folder)}
    there.pop(MANIFEST)
    problems += [f"{place}: is missing" for place in listed if place not in there]
    problems += [f"{place}: {problem}" for place, path in there.items() if (problem := _differs(path, listed.get(place)))]
    parents = {parent.as_posix() for place in listed for parent in Path(place).parents}
    folders = (Path(place).relative_to(folder).as_posix() for place, _, _ in os.walk(folder))
    return sorted([*problems, *(f"{place}: is an added folder" for place in folders if place not in parents | {"."})])


def _differs(path: Path, entry: tuple[str, int, str] | None) -> str:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if entry is None:
        return "was added"
    sha256, size, mode = entry
    if not stat.S_ISREG(found.st_mode):
        return "is no plain file"
    if found.st_size != size or digest.of_file(str(path)) != sha256:
        return "was changed"
    return "" if f"{stat.S_IMODE(found.st_mode):04o}" == mode else f"has the mode {stat.S_IMODE(found.st_mode):04o}, not {mode}"


def archive(folder: Path, name: str, target: Path) -> None:
    """`folder` as an uncompressed tar below `name/`: the same bytes wherever, whenever and by whomever it is made."""
    places = {path for file in walk(folder) for path in (file, *file.parents) if path.is_relative_to(folder)}
    with tarfile.TarFile(target, "w", format=tarfile.PAX_FORMAT, copybufsize=BLOCK) as tar:
        for path in sorted(places, key=lambda path: path.relative_to(folder).parts):
            found = path.lstat()
            info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}".removesuffix("/."))
            info.mtime, info.mode = EPOCH, stat.S_IMODE(found.st_mode)
            if path.is_dir():
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            info.size = found.st_size
            with path.open("rb") as file:
                tar.addfile(info, file)
    target.chmod(0o644)
