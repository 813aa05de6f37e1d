"""`edgebuild ci`: a pipeline for GitHub or GitLab, and the few words that it runs: what is dirty, what differs, a report.

The pipelines (edgebuild/pipelines/) are texts that hold two words of the project's, both checked: its folder, and what pip installs.
They ask at run time what there is to build, so that they are the same for every set of targets.
"""

import html
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgebuild import __version__, bundle, comparison, machine, release, shipped, toolchain
from edgebuild.doctor import apt
from edgebuild.errors import FAILED, OK, UserError, shown
from edgebuild.files import write_whole
from edgebuild.forecast import NOTHING, RESTORE, forecast
from edgebuild.gates import FAIL, INCONCLUSIVE
from edgebuild.memo import Memo
from edgebuild.noop import SIGN
from edgebuild.project import Project
from edgebuild.signing import TEST
from edgebuild.step import Step
from edgebuild.units import SEMVER

PLACES = {"github": ".github/workflows/edgebuild.yml", "gitlab": ".gitlab-ci.yml"}
EXTRAS = ("mlx", "onnxruntime", "openvino")  # of frameworks that pip installs beside one another; others get toolchains
ALWAYS = ({"when": "on_success"},)  # GitLab's rules of a job
TEST_KEY = ".edgebuild/cache/edgebuild/test-key"  # in a job of GitLab's, whose caches lie in the project
SHOWN = 3  # differences of one archive that are printed
FOLDER = re.compile(r"[A-Za-z0-9._/-]+\Z")
_CONTROLS = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2: what is no Char


def takes(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=(*PLACES, "apt", "compare", "dirty", "report", "toolchains", "version"),
        help="write a pipeline; or, in one, of the default targets: a script that installs the programs of their bundles, what of "
        "dist/ is not what other jobs built, those that have work, their gates, their toolchains; and a tag's version, where all of them can be released",
    )
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="compare: folders with archives; report: folders with evidence; version: the tag, vX.Y.Z",
    )
    parser.add_argument("--all", action="store_true", help="dirty: every default target")
    parser.add_argument("--gitlab", action="store_true", help="dirty: as a child pipeline")
    parser.add_argument("--junit", metavar="FILE", help="report: gates as JUnit XML")
    parser.add_argument("--summary", metavar="FILE", help="report: gates as Markdown")


def run(options: Namespace, enter: Callable[[], None]) -> int:
    """`enter` goes to the project's root, where that is needed; → exit status."""
    if options.what == "report":
        report(options.words, options.junit, options.summary)
        return OK
    words = list(map(os.path.abspath, options.words))
    enter()
    if options.what in PLACES:
        print(write(options.what))
        for problem in release.obstacles(Project()):
            print(f"a tag's release would be refused: {problem}", file=sys.stderr)
        return OK
    project = Project()
    status = _tell(project, options, words)
    project.memo.save()
    return status


def _tell(project: Project, options: Namespace, words: list[str]) -> int:
    if options.what == "dirty":
        names = project.defaults() if options.all else dirty(project)
        print(json.dumps(_child(names) if options.gitlab else names))
    elif options.what == "compare":
        problems = compare(project, words)
        print("\n".join(problems) or "every archive is what the other jobs built")
        return FAILED if problems else OK
    elif options.what == "version":
        print(_version(project, options.words))
    else:
        print("".join(f"{line}\n" for line in (programs if options.what == "apt" else toolchains)(project)), end="")
    return OK


# -- pipelines ----------------------------------------------------------------------------------------------------------
def write(system: str) -> str:
    """Write a pipeline where `system` looks for it; → what to say. Raises UserError where another one is there."""
    top = _top()
    text = pipeline(system, os.path.relpath(os.getcwd(), top))
    place = os.path.join(top, PLACES[system])
    if os.path.lexists(place):
        if _text(place) != text:
            raise UserError(f"{place} exists and says something else; remove it first, or keep yours")
        return f"{place} is up to date"
    write_whole(place, text.encode())
    return f"{place}: commit it; its head says which secret a release wants"


def pipeline(system: str, folder: str) -> str:
    """The pipeline's text for a project in `folder` of its repository. Raises UserError where that name could be taken for more."""
    _check_folder(folder)
    text = Path(shipped.PACKAGE, "pipelines", f"{system}.yml").read_text(encoding="utf-8")
    return text.replace("@EDGEBUILD@", _wanted(Project())).replace("@FOLDER@", folder)


def _check_folder(folder: str) -> None:
    if not FOLDER.match(folder) or ".." in folder:
        raise UserError(
            f"the project's folder {shown(folder)} cannot stand in a pipeline; rename it to letters, digits and . _ -"
        )


def _wanted(project: Project) -> str:
    """What pip installs: edgebuild of this version with the frameworks of the default targets."""
    named = {recipe.get("backend") for recipe in _recipes(project)}
    return f"edgebuild[{','.join(sorted({'release', *(name for name in EXTRAS if name in named)}))}]=={__version__}"


def _top() -> str:
    """The root of the git repository that holds the project; the project's own where there is none."""
    try:
        found = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, check=False)
    except FileNotFoundError:
        return os.getcwd()
    return os.fsdecode(found.stdout).rstrip("\n") if found.returncode == 0 else os.getcwd()


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def dirty(project: Project) -> list[str]:
    """The default targets of which a build would run a step, or say that one cannot: not those that are fresh or in the store."""
    return [name for name in project.defaults() if name in project.problems or _has_work(project, name)]


def _has_work(project: Project, name: str) -> bool:
    return any(step.will not in (NOTHING, RESTORE) for step in forecast(project, name).prospects)


def programs(project: Project) -> list[str]:
    """A script for root, on Debian and Ubuntu, that installs the programs which the default targets' bundles are made and proven by."""
    line = apt({_kind(project, step) for step in _packages(project)}, tokens=False)
    return ["export DEBIAN_FRONTEND=noninteractive", "apt-get update -q", line] if line else []


def toolchains(project: Project) -> list[str]:
    """`NAME DIGEST` of every toolchain that a step of the default targets runs in, or whose wheels it takes: not this Python."""
    labels = set()
    for recipe in _recipes(project):
        labels |= {recipe.get("toolchain", {}).get("lock", ""), recipe["params"].get("wheels", "")}
    locks = [toolchain.read(name) for name in sorted({label.partition(" ")[0] for label in labels if label})]
    return [f"{lock.name} {lock.digest}" for lock in locks if lock]


def compare(project: Project, places: Iterable[str]) -> list[str]:
    """A sentence for each archive of the default targets in dist/ that is not what lies in or below `places`, one of them too many too.

    Of a bundle that is signed, what its kind says is the same each time. Raises UserError where a place is no folder.
    """
    built: dict[str, list[Path]] = {}
    for place in places:
        if os.path.islink(place) or not os.path.isdir(place):
            raise UserError(f"{shown(place)} is no folder")
        for path in bundle.walk(Path(place)):
            if path.suffix == ".tar":
                built.setdefault(path.stem, []).append(path)
    here = {step.target: step for step in _packages(project) if "archive" in step.outputs}
    problems = []
    for name in sorted({*here, *built}):
        found = built.get(name, [])
        if len(found) == 1 and name in here:
            problem = _apart(project, here[name], found[0])
        else:
            problem = "there is no such archive" if name in here and not found else "it is one too many"
        if problem:
            problems.append(f"{shown(name)}: a build from an empty store gives other bytes than the cache: {problem}")
    return problems


def _apart(project: Project, step: Step, built: Path) -> str:
    """What differs between an archive in dist/ and what another job built of it, else empty."""
    memo, path = Memo(""), step.outputs["archive"]
    if built.is_symlink() or not built.is_file():
        return "it is a link or no plain file"
    try:
        if memo.look(path) == memo.look(str(built)):
            return ""
        read = comparison.reader(_kind(project, step), step.target, archive=True)
        found = comparison.differences(path, read(memo, str(built)), read(memo, path))
    except OSError as error:
        return f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join([*found[:SHOWN], *more])


def _recipes(project: Project) -> Iterator[Mapping[str, Any]]:
    return (project.recipes[step.recipe] for name in project.defaults() for step in project.of(name))


def _packages(project: Project) -> list[Step]:
    return [step for name in project.defaults() for step in project.of(name) if step.verb == "package"]


def _kind(project: Project, step: Step) -> str:
    return str(project.recipes[step.recipe]["params"]["kind"])


def _child(names: Iterable[str]) -> dict[str, Any]:
    """A pipeline of GitLab's that builds these targets, as JSON, which is YAML."""
    folder = os.path.relpath(os.getcwd(), _top())
    _check_folder(folder)
    begin = [
        f'cd "{folder}"',
        'export XDG_CACHE_HOME="$PWD/.edgebuild/cache"',
        'python -m pip install --disable-pip-version-check -q "$EDGEBUILD"',
        "edgebuild ci apt | sh -e",
    ]
    jobs = {f"build:{name}": _build(name, folder) for name in names}
    nothing = {"nothing": {"stage": "build", "rules": ALWAYS, "script": ["echo every default target is up to date"]}}
    return {
        "stages": ["build", "keep"],
        "variables": {"EDGEBUILD_MEASURED": "elsewhere", SIGN: TEST},
        "default": {"image": "$EDGEBUILD_IMAGE", "before_script": begin},
        **({**jobs, "keep": _keep(folder)} if jobs else nothing),
    }


def _build(name: str, folder: str) -> dict[str, Any]:
    return {
        "stage": "build",
        "rules": ALWAYS,
        "needs": [{"pipeline": "$PARENT_PIPELINE_ID", "job": "plan"}],  # for its test key
        "cache": _caches(folder, "pull"),
        "variables": {"TARGET": name},
        "script": ["mkdir -p .edgebuild && touch .edgebuild/begun", 'edgebuild "build:$TARGET"'],
        "after_script": [
            f'cd "{folder}"',
            'edgebuild ci report "build/$TARGET" .edgebuild/last-run.json --junit gates.xml --summary "summary-$TARGET.md"',
            "mkdir -p .edgebuild/objects .edgebuild/records stores",
            "find .edgebuild/objects .edgebuild/records -type f -newer .edgebuild/begun -print0"
            ' | tar -cf "stores/$TARGET.tar" --null -T -',
        ],
        "artifacts": {
            "when": "always",
            "paths": [f"{folder}/{place}" for place in ("dist", "stores", f"summary-{name}.md", TEST_KEY)],
            "reports": {"junit": f"{folder}/gates.xml"},
            "expire_in": "1 week",
        },
    }


def _keep(folder: str) -> dict[str, Any]:
    return {
        "stage": "keep",
        "rules": [{"if": "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH", "when": "always"}],
        "cache": _caches(folder, "pull-push"),
        "script": [
            'for made in stores/*.tar; do tar -xf "$made" --no-same-owner; done',
            "edgebuild verify --store || edgebuild verify --store",
            "timeout 30m edgebuild build || true",  # settles what two jobs made alike, and tells gc what is needed
            "edgebuild gc --max-size 5GB",
            "edgebuild ci toolchains | cut -d ' ' -f 1 | xargs -r edgebuild toolchain install || true",  # the store is kept anyway
        ],
    }


def _caches(folder: str, policy: str) -> list[dict[str, Any]]:
    """The store with the test key; the toolchains, others for another image or edgebuild, which the pipeline's file names."""
    store = [f"{folder}/{place}" for place in (".edgebuild/objects", ".edgebuild/records", TEST_KEY)]
    key = {"files": [PLACES["gitlab"]], "prefix": "edgebuild-toolchains"}
    return [
        {"key": "edgebuild-store", "policy": policy, "paths": store},
        {"key": key, "policy": policy, "paths": [f"{folder}/.edgebuild/cache/edgebuild/toolchains"]},
    ]


def _version(project: Project, words: list[str]) -> str:
    """A release's version out of its tag. Raises UserError where that is no `v` and a semantic version, or a target has no release."""
    if len(words) != 1 or not words[0].startswith("v") or not SEMVER.match(words[0][1:]):
        raise UserError(f"a release's tag is v and a semantic version, such as v1.2.0, not {shown(' '.join(words))}")
    if problems := release.obstacles(project):
        raise UserError("; ".join(problems))
    return words[0][1:]


# -- reports ------------------------------------------------------------------------------------------------------------
def report(places: Iterable[str], junit: str | None, summary: str | None) -> None:
    """Gates of all evidence, and the steps that failed, in or below `places`. Raises UserError where a file is of another form."""
    evidence: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for path in _files(places):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "last-run.json":
                failed |= {step["name"]: str(step["reason"]) for step in content["steps"] if step["outcome"] == "failed"}
            else:
                evidence.append({key: content[key] for key in ("target", "version", "gates", "bundle", "measurements")})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no evidence of edgebuild's ({type(error).__name__})") from error
    evidence.sort(key=lambda one: str(one["target"]))
    if junit:
        write_whole(os.path.abspath(junit), _junit(evidence, failed))
    text = _markdown(evidence, failed)
    if summary:
        write_whole(os.path.abspath(summary), text.encode())
    if not (junit or summary):
        print(text, end="")


def _files(places: Iterable[str]) -> Iterator[Path]:
    for place in map(Path, places):
        below = sorted(place.rglob("*.json")) if place.is_dir() else [place]
        yield from (path for path in below if path.name.endswith("evidence.json") or path.name == "last-run.json")


def _verdict(gate: Mapping[str, Any]) -> str:
    waiver = gate["waived"]
    return f"{gate['verdict']}, waived until {waiver['until']}: {waiver['reason']}" if waiver else str(gate["verdict"])


def _junit(evidence: list[dict[str, Any]], failed: Mapping[str, str]) -> bytes:
    """The form that GitHub's and GitLab's readers share: testsuite, testcase, failure, skipped, error."""
    root = ElementTree.Element("testsuites", name="edgebuild")
    for one in evidence:
        suite = ElementTree.SubElement(root, "testsuite", name=_plain(one["target"]), tests=str(len(one["gates"])))
        for gate in one["gates"]:
            case = ElementTree.SubElement(suite, "testcase", classname=_plain(one["target"]), name=_plain(gate["name"]))
            stops = gate["verdict"] == FAIL or (gate["verdict"] == INCONCLUSIVE and gate["required"])
            if gate["verdict"] in (FAIL, INCONCLUSIVE):
                what = "failure" if stops and not gate["waived"] else "skipped"
                ElementTree.SubElement(case, what, message=_plain(f"{_verdict(gate)}: {gate['reason']}"))
    if failed:
        suite = ElementTree.SubElement(root, "testsuite", name="steps", tests=str(len(failed)))
        for name, reason in sorted(failed.items()):
            case = ElementTree.SubElement(suite, "testcase", classname="steps", name=_plain(name))
            ElementTree.SubElement(case, "error", message=_plain(reason))
    for suite in root:
        for attribute, tag in (("failures", "failure"), ("skipped", "skipped"), ("errors", "error")):
            suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    return ('<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n").encode()


def _markdown(evidence: list[dict[str, Any]], failed: Mapping[str, str]) -> str:
    here = ", ".join(machine.fingerprint().values())
    lines = ["## edgebuild", ""]
    if evidence:
        lines += ["| target | gate | verdict | limit | |", "|---|---|---|---|---|"]
    for one in evidence:
        for gate in one["gates"]:
            lines.append(_row(one["target"], gate["name"], _verdict(gate), gate["limit"], gate["reason"]))
    for one in evidence:
        bundle = one["bundle"]
        packed = (
            f"{bundle['files']} files, proven to {bundle['level']}" if bundle["files"] else bundle.get("reason", "not packed")
        )
        elsewhere = sorted({str(row["machine"]) for row in one["measurements"] if row["machine"] not in (None, here)})
        measured = f"; measured elsewhere: {'; '.join(elsewhere)}" if elsewhere else ""
        lines += ["", _escaped(f"{one['target']} {one['version']}: {bundle['kind']} bundle, {packed}{measured}")]
    for name, reason in sorted(failed.items()):
        lines += ["", f"**{_escaped(name)} failed:** {_escaped(reason)}"]
    return "\n".join([*lines, ""])


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: object) -> str:
    """Somebody else's words in Markdown: no markup, no mention of anybody, one line."""
    line = html.escape(" ".join(_plain(text).split()))
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line).replace("@", "&#64;")


def _plain(text: object) -> str:
    return _CONTROLS.sub("�", str(text))
