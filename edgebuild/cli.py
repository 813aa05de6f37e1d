"""The `edgebuild` command: its own few words, and everything else handed to doit. A no-op is answered without doit."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebuild.errors import FAULT, INTERRUPTED, OK, USAGE, EdgebuildError, StepFailed, UserError, did_you_mean, disk

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from edgebuild.project import Project


def main(arguments: list[str] | None = None) -> int:
    """→ exit status: 0 done, 1 a step failed, 2 a fault, 3 wrong usage or a bad target, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return _main(words)
    except EdgebuildError as error:
        print(f"edgebuild: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _main(words: list[str]) -> int:
    start = time.monotonic()
    if words[:2] == ["completion", "--words"]:
        return _words(words[2:])
    before, words = _options(words)
    strict = "--strict" in before
    if "--offline" in before:
        os.environ["EDGEBUILD_OFFLINE"] = "1"
    if words[:1] == ["--version"]:
        from edgebuild import __version__

        print(f"edgebuild {__version__}")
        return OK
    if words[:1] in (["--help"], ["-h"]):
        print(_help(), end="")
        return OK
    if words and (command := COMMANDS.get(words[0])):
        if strict and not command.builds:
            builds = ", ".join(name for name, one in COMMANDS.items() if one.builds)
            raise UserError(
                f"--strict is for what builds: edgebuild --strict alone, with tasks, or with {builds}; {words[0]} does not"
            )
        return _command(words[0], command, words[1:], strict)
    _enter_project()
    if not words and _nothing_to_do(strict, start):
        return OK
    return _doit(words, strict)


# -- commands of our own: a row each ------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """`takes` adds its arguments to a parser; `run` gets them, in the project's root where it needs a project."""

    about: str
    example: str
    takes: "Callable[[ArgumentParser], object]"
    run: "Callable[[Namespace], int]"
    project: bool = True
    builds: bool = False  # whether --strict before it says something
    mixed: bool = False  # whether options may stand between its words


def _init(options: "Namespace") -> int:
    from edgebuild.init import init

    print(init(options.folder))
    return OK


def _explain(options: "Namespace") -> int:
    from edgebuild.explain import explain, show

    project, name = _target(options.target)
    print(show(explain(project, name), options.json))
    project.memo.save()
    return OK


def _plan(options: "Namespace") -> int:
    from edgebuild.preview import preview

    project, name = _target(options.target)
    text, status = preview(project, name, options.json)
    print(text)
    project.memo.save()
    return status


def _remeasure(options: "Namespace") -> int:
    project, name = _target(options.target)
    measuring = [step.name for step in project.of(name) if "machine" in project.recipes[step.recipe]]
    if not measuring:
        benchmark = next(step for step in project.of(name) if step.verb == "benchmark")
        reason = project.recipes[benchmark.recipe]["params"]["not_measured"]
        raise UserError(f"nothing of {name} is measured on this machine, so there is nothing to measure again: {reason}")
    return _doit([f"build:{name}", f"again={','.join(measuring)}"], options.strict)


def _doctor(options: "Namespace") -> int:
    from edgebuild.doctor import apt, doctor

    if options.apt:
        print(apt())
        return OK
    try:
        _enter_project()
    except UserError:
        pass  # without a project it looks at this folder
    text, status = doctor(os.path.abspath(os.environ.get("EDGEBUILD_STORE") or ".edgebuild"), options.json)
    print(text)
    return status


def _assess(options: "Namespace") -> int:
    from edgebuild.assessment import assessment

    print(assessment(options.model, options.json))
    return OK


def _recommend(options: "Namespace") -> int:
    from edgebuild.recommend import Asked, recommend

    asked = Asked(model=options.model, platform=options.platform, task=options.task, prefer=options.prefer)
    text, status = recommend(asked, _project_above(os.getcwd()) or os.getcwd(), options.json)
    print(text)
    return status


def _model(parser: "ArgumentParser") -> None:
    parser.add_argument("model", metavar="MODEL", help="a path, hf:ORG/REPO@COMMIT or package:DISTRIBUTION/path")
    _json(parser)


def _model_and_platform(parser: "ArgumentParser") -> None:
    _model(parser)
    parser.add_argument("--platform", required=True, help="a platform's name, built in or of this project")
    parser.add_argument("--task", default="", help="what the model is for, as in a target; guessed where it is not given")
    parser.add_argument("--prefer", default="", help="what to put first, as in a target: multiplatform, enterprise, …")


def _toolchain(options: "Namespace") -> int:
    from edgebuild.equip import run

    return run(options)


def _toolchains(parser: "ArgumentParser") -> None:
    from edgebuild.equip import takes

    takes(parser)


def _completion(options: "Namespace") -> int:
    from edgebuild.completion import SCRIPTS

    print(SCRIPTS[options.shell], end="")
    return OK


def _json_or_apt(parser: "ArgumentParser") -> None:
    _json(parser)
    parser.add_argument("--apt", action="store_true", help="print the line that installs the programs that bundles are proven by")


def _shell(parser: "ArgumentParser") -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def _words(asked: list[str]) -> int:
    """What completion's scripts ask: the word at the cursor, then those before it; never through argparse, as it may be `--`."""
    from edgebuild.completion import words

    try:
        _enter_project()
    except UserError:
        pass  # then there are no tasks to name
    current, *before = asked or [""]
    _, before = _options(before)
    name = before[0] if before else ""
    print("\n".join(words(current, before, COMMANDS, _parser(name, COMMANDS[name]) if name in COMMANDS else None)))
    return OK


def _options(words: list[str]) -> tuple[list[str], list[str]]:
    """The options that stand before all other words, and the rest."""
    count = next((place for place, word in enumerate(words) if word not in ("--strict", "--offline")), len(words))
    return words[:count], words[count:]


def _one_target(parser: "ArgumentParser") -> None:
    parser.add_argument("target", metavar="TARGET", help="a target's name")


def _one_target_or_json(parser: "ArgumentParser") -> None:
    _one_target(parser)
    _json(parser)


def _json(parser: "ArgumentParser") -> None:
    parser.add_argument("--json", action="store_true", help="for programs; schemas/ says what it holds")


def _verify(options: "Namespace") -> int:
    if options.store:
        from edgebuild import fsck

        return fsck.run(lambda: _waits("builds that use the store"))
    from edgebuild.verify import run

    return run(*_target(options.target))


def _gc(options: "Namespace") -> int:
    from edgebuild.gc import run

    return run(options, lambda: _waits("builds that use the store"))


def _du(options: "Namespace") -> int:
    from edgebuild.du import show, usage
    from edgebuild.project import Project

    print(show(usage(Project()), options.json))
    return OK


def _waits(what: str) -> None:
    print(f"waits for {what}", file=sys.stderr, flush=True)


def _target_or_store(parser: "ArgumentParser") -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("target", metavar="TARGET", nargs="?", help="rebuild this target apart and compare")
    which.add_argument("--store", action="store_true", help="hash every object again and check every record")


def _what_to_keep(parser: "ArgumentParser") -> None:
    from edgebuild.gc import takes

    takes(parser)


def _releases(parser: "ArgumentParser") -> None:
    from edgebuild.release import takes

    takes(parser)


def _release(options: "Namespace") -> int:
    from edgebuild.release import run

    return run(options, _enter_project, lambda words: _doit(words, options.strict))


def _keys(parser: "ArgumentParser") -> None:
    from edgebuild.release import takes_key

    takes_key(parser)


def _key(options: "Namespace") -> int:
    from edgebuild.release import key

    return key(options)


def _pipelines(parser: "ArgumentParser") -> None:
    from edgebuild.ci import takes

    takes(parser)


def _ci(options: "Namespace") -> int:
    from edgebuild.ci import run

    return run(options, _enter_project)


COMMANDS: dict[str, Command] = {
    "init": Command(
        about="make DIR and a working project in it",
        example="edgebuild init digits && cd digits && doit",
        takes=lambda parser: parser.add_argument("folder", metavar="DIR", help="a folder that does not exist yet, or is empty"),
        run=_init,
        project=False,
    ),
    "explain": Command(
        about="say for each step of a target: fresh, stale, restorable or waiting, and which part of its key differs",
        example="edgebuild explain web-digits",
        takes=_one_target_or_json,
        run=_explain,
    ),
    "verify": Command(
        about="rebuild a target apart and compare its bytes, or check the whole store",
        example="edgebuild verify web-digits\n  edgebuild verify --store",
        takes=_target_or_store,
        run=_verify,
    ),
    "gc": Command(
        about="remove from the store what no project needs that uses it",
        example="edgebuild gc --keep-last 2 --dry-run\n  edgebuild gc --max-size 20GB",
        takes=_what_to_keep,
        run=_gc,
    ),
    "du": Command(
        about="say how many bytes of the store each target needs, and what gc would free",
        example="edgebuild du --json",
        takes=_json,
        run=_du,
    ),
    "plan": Command(
        about="say what a build of a target would do, make and need, and what cannot pass, without doing it",
        example="edgebuild plan web-digits",
        takes=_one_target_or_json,
        run=_plan,
    ),
    "assess": Command(
        about="say what a model is, from its headers alone, and what each backend would make of it",
        example="edgebuild assess targets/models/tiny-phi3",
        takes=_model,
        run=_assess,
        project=False,
    ),
    "recommend": Command(
        about="say which framework suits a model on a platform, which is next, and why the others are not",
        example="edgebuild recommend targets/models/digits.onnx --platform android",
        takes=_model_and_platform,
        run=_recommend,
        project=False,
    ),
    "remeasure": Command(
        about="time a target's model again though its measurements hold, and build all that follows from that",
        example="edgebuild remeasure web-digits",
        takes=_one_target,
        run=_remeasure,
        builds=True,
    ),
    "release": Command(
        about="build all default targets, and put their archives and evidence under a signed list; or verify that",
        example="edgebuild release out package.version=1.2.0 --key release.key\n  edgebuild release --verify out --key release.key.pub",
        takes=_releases,
        run=_release,
        project=False,
        builds=True,
        mixed=True,
    ),
    "key": Command(
        about="make the pair of keys that releases are signed and verified with",
        example="edgebuild key new release.key",
        takes=_keys,
        run=_key,
        project=False,
    ),
    "ci": Command(
        about="write the pipeline that builds this project's targets in CI and releases them on a tag",
        example="edgebuild ci github\n  edgebuild ci report build --junit gates.xml",
        takes=_pipelines,
        run=_ci,
        project=False,
        mixed=True,
    ),
    "doctor": Command(
        about="say what there is to work with here: backends, each tried; machine, disks, accelerators",
        example="edgebuild doctor --json",
        takes=_json_or_apt,
        run=_doctor,
        project=False,
    ),
    "toolchain": Command(
        about="make, show or remove the environments that backends run in where this Python has not their packages",
        example="edgebuild toolchain install onnxruntime\n  edgebuild toolchain list",
        takes=_toolchains,
        run=_toolchain,
        project=False,
        mixed=True,
    ),
    "completion": Command(
        about="print a script that completes commands, tasks and targets in a shell",
        example='eval "$(edgebuild completion bash)"',
        takes=_shell,
        run=_completion,
        project=False,
    ),
}


def _help() -> str:
    rows = "".join(f"  edgebuild {name:<14} {command.about}\n" for name, command in COMMANDS.items())
    return f"""edgebuild: a model compiler for the edge

  edgebuild                build every default target (as `doit` alone)
  edgebuild build:NAME     build one target; any other words go to doit too
  edgebuild list           the targets, with their descriptions
{rows}
options before any words: --strict (an INCONCLUSIVE gate fails), --offline (no package index is asked), --help, --version
`edgebuild COMMAND --help` shows an example; `edgebuild help` is doit's own help.
"""


def _command(name: str, command: Command, words: list[str], strict: bool) -> int:
    try:
        parser = _parser(name, command)
        options = parser.parse_intermixed_args(words) if command.mixed else parser.parse_args(words)
    except SystemExit as stop:  # argparse has said why
        return USAGE if stop.code else OK
    options.strict = strict
    if command.project:
        _enter_project()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is begun is cleaned up
    try:
        return command.run(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StepFailed(disk(error)) from error
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(name: str, command: Command) -> "ArgumentParser":
    from argparse import ArgumentParser, RawDescriptionHelpFormatter

    parser = ArgumentParser(
        prog=f"edgebuild {name}",
        description=command.about[0].upper() + command.about[1:] + ".",
        epilog=f"example:\n  {command.example}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.takes(parser)
    return parser


def _target(word: str) -> "tuple[Project, str]":
    """The project here, and the target that is meant. Raises UserError where it cannot be planned or does not exist."""
    from edgebuild.project import Project

    project, name = Project(), word.removeprefix("build:")
    if name in project.problems:
        raise UserError(project.problems[name])
    if name in project.groups:
        raise UserError(f"targets/{name}.yaml gives several targets; name one of them: {', '.join(project.groups[name])}")
    if name not in project.targets:
        known = project.names()
        raise UserError(f'there is no target "{name}"; there are: {", ".join(known)}.{did_you_mean(name, known)}')
    return project, name


# -- everything else ----------------------------------------------------------------------------------------------------
def _nothing_to_do(strict: bool, start: float) -> bool:
    """Whether all is fresh, and nothing that says so has moved or holds something else; then says it, as a run through doit would."""
    from edgebuild.noop import identity, recall

    who = identity(strict=strict)
    steps = recall(who)
    if steps is None:
        from edgebuild.memo import MEMO, Memo

        memo = Memo(MEMO)
        steps = recall(who, memo.holds)
        memo.save()  # what was hashed is not hashed again, whatever follows
    if steps is None:
        return False
    from edgebuild.journal import write_last_run

    write_last_run([{"name": name, "outcome": "fresh", "reason": "", "seconds": 0.0} for name in steps], time.monotonic() - start)
    return True


def _doit(words: list[str], strict: bool = False) -> int:
    from doit.doit_cmd import DoitMain

    from edgebuild.tasks import asks, check_option

    check_option(words)
    words = [*asks(words), *(["strict=1"] if strict else [])]
    if words[:1] in (["help"], ["list"], ["info"]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads them may stop reading, which doit takes for a fault
    sys.argv = ["edgebuild", *words]
    try:
        return int(DoitMain().run(words) or OK)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAULT


def _enter_project() -> None:
    """Go to the project's root. Raises UserError where there is none."""
    root = _project_above(os.getcwd())
    if root is None:
        raise UserError("no project here: a project has dodo.py and targets/; go to one, or make one: edgebuild init DIR")
    os.chdir(root)


def _project_above(here: str) -> str | None:
    """The nearest folder, here or above, that has a `dodo.py` beside `targets/`."""
    while not (os.path.isfile(os.path.join(here, "dodo.py")) and os.path.isdir(os.path.join(here, "targets"))):
        above = os.path.dirname(here)
        if above == here:
            return None
        here = above
    return here
