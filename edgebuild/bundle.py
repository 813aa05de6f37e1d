"""The `package` step: an artifact, a golden example and rendered templates become a folder for a device's tools, and its archive.

A bundle's bytes depend on artifact, templates, parameters and signing key; never on time, place or umask.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgebuild import digest, machine, sandbox
from edgebuild.backend import Backend
from edgebuild.errors import StepFailed
from edgebuild.render import Word, check_values, identifier, render, word
from edgebuild.signing import Pair, public
from edgebuild.step import Action, Image, Outcome
from edgebuild.units import SEMVER, folded, human, name_problem

MANIFEST = "manifest.json"
EPOCH = 315532800  # 1980-01-01: the earliest time that every archive format can hold
BLOCK = 1 << 20  # bytes read at once
TIMEOUT = 900  # seconds for a bundle's own self-test
RUNTIMES: Mapping[str, str] = {  # framework → what a device runs its models by, and under which licence
    "llamacpp": "llama.cpp: MIT licence, the ggml authors",
    "mlx": "MLX and mlx-lm: MIT licence, Apple Inc.",
    "olive": "ONNX Runtime: MIT licence, Microsoft Corporation",
    "onnxruntime": "ONNX Runtime: MIT licence, Microsoft Corporation",
    "openvino": "OpenVINO: Apache License 2.0, Intel Corporation",
}
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """What a kind makes further files of a bundle from. `values`: what its templates may name; `key`: where the kind signs."""

    out: Path
    payload: Payload
    values: Mapping[str, Any]
    example: Mapping[str, Any]  # golden.json's content
    scratch: Path  # an empty folder, gone afterwards
    key: Pair | None
    image: Image | None = None  # where the kind's bundles are built to images


@dataclass(frozen=True, kw_only=True, slots=True)
class Proving(Making):
    """A finished bundle, for its real tool. `runs` holds its model against the golden example, and names the runtime."""

    runs: Callable[[], str]  # raises StepFailed
    tools: Mapping[str, str]  # what `verify` used


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """How many times packing writes the weights, in one format or another; for what is known before any work."""

    bundle: int = 1  # as the budget of weights counts them
    converted: int = 0  # of those, what a runtime makes that holds the model meanwhile
    tests: int = 0  # in the bundle too, for tests on a device, and in no budget
    scratch: int = 0  # at the most beside these, gone when it is packed
    room: int = 0  # bytes of other things that are gone then too


class BundleKind(Protocol):
    CODE: Sequence[str]  # modules below edgebuild whose text is in the package step's key
    COPIES: Copies
    TOOLS: Mapping[str, str]  # program or absolute path that it needs → Debian's package; without one it is proven less far
    LOCKS: Mapping[str, str]  # framework → the lock of the wheels that a bundle holds, as toolchains have one

    def refuse(self, framework: str, task: str) -> str:
        """Why it cannot hold such a model, in one sentence, else empty; pure."""

    def stated(self, device: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a bundle states of a device, from the facts of its platform; pure: a plan asks too. Raises WrongFact."""

    def payload(self, model: Path, module: str) -> Payload:
        """The artifact's place in the bundle; reads names alone. Raises StepFailed."""

    def values(self, common: Mapping[str, Any]) -> Mapping[str, Any]:
        """What its templates may name beside the common values, from these. Raises StepFailed.

        `form`: a folder `for-FORM/` of templates is for it, as one may be for a framework.
        """

    def make(self, making: Making) -> Mapping[str, bool | None]:
        """Further files, made from the model in place; → path in the bundle: whether it is weights. Raises StepFailed.

        None: it is there for a test on the device, never delivered to users, and counts in no budget.
        """

    def assemble(self, making: Making) -> Mapping[str, bool | None]:
        """As `make`, once every template but the README is rendered: archives and images of what lies in the bundle."""

    def verify(self, out: Path) -> Mapping[str, str]:
        """Check a finished bundle without running it; → by which tools, name → version. Raises StepFailed."""

    def consume(self, proving: Proving) -> Proof:
        """Have the real tool take a finished bundle, as far as it is here. Raises StepFailed."""


def run(action: Action, backend_name: str, backend: Backend, kind: BundleKind) -> Outcome:
    """Outputs `bundle`, `report` and, where it is asked for, `archive`. Raises StepFailed."""
    from edgebuild import golden

    params, out, model = action.params, action.outputs["bundle"], action.inputs["model"]
    _check_key(action)
    common = _common(action, backend_name)
    values = {**common, **kind.values(common)}
    payload = kind.payload(model, values["module"])
    size = sum(path.stat().st_size for path in payload.files.values())
    _budget("weights", size, params["limits"])
    example = golden.make(backend, model)
    values |= {**_of_example(example), "model_bytes": size}
    check_values(values)
    files = _Files(out)
    for place, source in sorted(payload.files.items()):
        files.copy(place, source)
    with tempfile.TemporaryDirectory(prefix="edgebuild-package-") as scratch:
        given: dict[str, Any] = {"out": out, "payload": payload, "values": values, "example": example, "key": action.key}
        given["image"] = action.image
        made = dict(files.adopt(kind.make(Making(**given, scratch=_folder(scratch, "make")))))
        files.write(payload.golden, golden.dumps(example).encode())
        for name in values["licences"]:
            files.copy(f"licences/{name}", action.inputs[f"licence/{name}"])
        pages = _render_all(action, values, files)
        made |= files.adopt(kind.assemble(Making(**given, scratch=_folder(scratch, "assemble"))))
        parts = dict.fromkeys(payload.files, True) | made
        weights, tests = (_size(out, (place for place, part in parts.items() if part is which)) for which in (True, None))
        _render_pages(pages, values, files, weights, tests)
        named = {key: params[key] for key in ("name", "version", "kind")}
        count = write_manifest(out, {**named, "framework": backend_name, "platform": params["platform"]["name"]})
        proving: dict[str, Any] = {"runs": lambda: golden.hold(example, backend, out / payload.model), "tools": kind.verify(out)}
        proof = kind.consume(Proving(**given, **proving, scratch=_folder(scratch, "consume")))
    if problems := verify(out):
        raise StepFailed(f"checking the bundle changed it: {problems[0]}; this is a fault of edgebuild or of the runtime")
    return _finish(action, proof, weights, tests, count)


def _size(folder: Path, places: Iterable[str]) -> int:
    return sum((folder / place).stat().st_size for place in places)


def _check_key(action: Action) -> None:
    """Raises StepFailed where the key is not the one that the step's own key names."""
    expected = action.params.get("sign", {}).get("public")
    try:
        if action.key and expected and public(action.key) != expected:
            raise StepFailed("package.sign: the key was exchanged while this was built; build again")
    except ValueError as error:
        raise StepFailed(f"package.sign: {error}") from error


def _folder(place: str, name: str) -> Path:
    folder = Path(place, name)
    folder.mkdir()
    return folder


def _finish(action: Action, proof: Proof, weights: int, tests: int, count: int) -> Outcome:
    params, out = action.params, action.outputs["bundle"]
    total = sum(path.stat().st_size for path in walk(out))
    shell = total - weights - tests
    _budget("weights", weights, params["limits"])
    _budget("shell", shell, params["limits"])
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
        "shell_bytes": shell,
        **({"test_bytes": tests} if tests else {}),
        "test_key": bool(action.key and action.key.test),
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sizes = f"weights {human(weights)}, {f'for tests {human(tests)}, ' if tests else ''}the rest {human(shell)}"
    signed = "; test key: not for release" if report["test_key"] else ""
    return Outcome(summary=f"{params['kind']} bundle, {count} files, {sizes}, proven to {proof.level}{signed}")


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
    """Run a bundle's own Python self-test, in a sandbox where one can be made; → the evidence that it prints last. Raises StepFailed."""
    done = sandbox.python(out.absolute() / script, timeout=TIMEOUT)
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
        "runtime_licence": RUNTIMES.get(backend_name, "the same as edgebuild's"),
        "test_key": bool(action.key and action.key.test),
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


# -- templates --------------------------------------------------------------------------------------------------------------
def _templates(inputs: Mapping[str, Path], wanted: Collection[str]) -> list[tuple[str, Path]]:
    """(path in the bundle, with `.j2` and `__name__`; file). What lies in a folder `for-NAME-NAME/` is for those alone."""
    chosen = {}
    for role, path in inputs.items():
        kind, _, rel = role.partition("/")
        first, _, rest = rel.partition("/")
        if kind == "template" and (not first.startswith("for-") or not set(first.split("-")[1:]).isdisjoint(wanted)):
            chosen[rest if first.startswith("for-") else rel] = path
    return sorted(chosen.items())


def _render_all(action: Action, values: Mapping[str, Any], files: _Files) -> list[tuple[str, str]]:
    """Every template to its place; → (path, text) of the README, which comes last: it states how much the others take."""
    pages = []
    for rel, path in _templates(action.inputs, {values["framework"], values.get("form", "")}):
        place = rel.removesuffix(".j2").replace("__name__", values["module"])
        if not rel.endswith(".j2"):
            files.copy(place, path, script=True)
            continue
        try:
            source = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise StepFailed(f"template {rel} is no UTF-8 text: byte {error.start}; save it as UTF-8") from error
        if rel == "README.md.j2":
            pages.append((rel, source))
        else:
            files.write(place, render(source, rel, values).encode())
    return pages


def _render_pages(pages: Sequence[tuple[str, str]], values: Mapping[str, Any], files: _Files, weights: int, tests: int) -> None:
    shell = sum(found.stat().st_size for found in walk(files.root)) - weights - tests
    sizes = {"weights": human(weights), "weights_bytes": weights, "shell": human(shell), "shell_bytes": shell}
    for rel, source in pages:
        files.write(rel.removesuffix(".j2"), render(source, rel, {**values, **sizes}).encode())


# -- files ------------------------------------------------------------------------------------------------------------------
class _Files:
    """Writes a bundle's files, no path twice, with the modes that bundles have whatever the umask."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._taken = {folded(MANIFEST): MANIFEST}
        root.mkdir()
        root.chmod(0o755)

    def adopt(self, made: Mapping[str, bool | None]) -> Mapping[str, bool | None]:
        """Files that lie in the bundle already."""
        for place in made:
            self._claim(place)
            _mode(self.root / place, script=False)
        return made

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
