"""The `edgebuild` command: its own few words, and everything else handed to doit. A no-op is answered without doit."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebuild.errors import FAILED, FAULT, INTERRUPTED, OK, USAGE, EdgebuildError, StepFailed, UserError, did_you_mean, disk

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
    if words[:1] == ["--version"]:
        from edgebuild import __version__

        print(f"edgebuild {__version__}")
        return OK
    if words[:1] in (["--help"], ["-h"]):
        print(_help(), end="")
        return OK
    if words[:2] == ["completion", "--words"]:
        return _words(words[2:])
    if words and (command := COMMANDS.get(words[0])):
        return _command(words[0], command, words[1:])
    strict = False
    while words[:1] in (["--strict"], ["--offline"]):
        if words[0] == "--offline":
            os.environ["EDGEBUILD_OFFLINE"] = "1"
        strict |= words[0] == "--strict"
        words = words[1:]
    _enter_project()
    if not words and _nothing_to_do(strict, start):
        return OK
    return _doit([*words, *(["strict=1"] if strict else [])])


# -- commands of our own: a row each ------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """`takes` adds its arguments to a parser; `run` gets them, in the project's root where it needs a project."""

    about: str
    example: str
    takes: "Callable[[ArgumentParser], object]"
    run: "Callable[[Namespace], int]"
    project: bool = True


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
    return _doit([f"build:{name}", f"again={','.join(measuring)}"])


def _doctor(options: "Namespace") -> int:
    from edgebuild.doctor import doctor

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
    from edgebuild import equip

    if options.offline:
        os.environ["EDGEBUILD_OFFLINE"] = "1"
    if options.what == "list":
        print("\n".join(equip.show()))
        return OK
    wanted = equip.locks(options.names, options.all)
    if options.what == "install":
        return equip.make(wanted)
    print("\n".join(equip.drop(wanted)))
    return OK


def _toolchains(parser: "ArgumentParser") -> None:
    parser.add_argument("what", choices=("install", "list", "remove"), help="make environments, show them, or remove them")
    parser.add_argument("names", metavar="NAME", nargs="*", help="toolchains, as `edgebuild toolchain list` names them")
    parser.add_argument("--all", action="store_true", help="every toolchain")
    parser.add_argument("--offline", action="store_true", help="ask no package index: say what is missing")


def _completion(options: "Namespace") -> int:
    from edgebuild.completion import SCRIPTS

    print(SCRIPTS[options.shell], end="")
    return OK


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
    parsers = {name: _parser(name, command) for name, command in COMMANDS.items()}
    print("\n".join(words(current, before, parsers)))
    return OK


def _one_target(parser: "ArgumentParser") -> None:
    parser.add_argument("target", metavar="TARGET", help="a target's name")


def _one_target_or_json(parser: "ArgumentParser") -> None:
    _one_target(parser)
    _json(parser)


def _json(parser: "ArgumentParser") -> None:
    parser.add_argument("--json", action="store_true", help="for programs; schemas/ says what it holds")


def _verify(options: "Namespace") -> int:
    if options.store:
        return _verify_store()
    from edgebuild.fresh import Fresh
    from edgebuild.process import Workers, collect
    from edgebuild.progress import display
    from edgebuild.run import Builder
    from edgebuild.verify import doubt, show, steps_of, verify

    project, name = _target(options.target)
    collect(project.store.root)
    terminal = display(len(steps_of(project, name)))
    try:
        found = verify(project, name, Builder(project, Fresh(project), Workers(), tell=terminal.told, watcher=terminal), terminal)
    finally:
        terminal.close()
    print(show(found, name))
    doubt(project, found)
    project.memo.save()
    return FAILED if any(one.differences for one in found) else OK


def _verify_store() -> int:
    from edgebuild import fsck
    from edgebuild.progress import hashing
    from edgebuild.project import Project
    from edgebuild.units import human

    start, store = time.monotonic(), Project().store
    with hashing(fsck.size(store)) as grow:
        health = fsck.check(store, grow, lambda: _waits("builds that use the store"))
    for damage in health.damaged:
        print(f"{damage}; removed, a build that needs it makes it again")
    print(
        f"store {store.root}: {health.objects:,} objects, {human(health.bytes)}, {health.records:,} records, "
        f"{len(health.damaged):,} damaged ({time.monotonic() - start:.1f} s)"
    )
    return FAILED if health.damaged else OK


def _gc(options: "Namespace") -> int:
    from edgebuild import gc
    from edgebuild.project import Project

    project = Project()
    if options.forget is not None:
        gc.forget(project.store, options.forget)
    found = gc.collect(project, options.keep_last, options.max_size, options.dry_run, lambda: _waits("builds that use the store"))
    print(gc.show(found, options.dry_run))
    gc.check_size(found, options.max_size)
    return OK


def _du(options: "Namespace") -> int:
    from edgebuild.du import show, usage
    from edgebuild.project import Project

    print(show(usage(Project()), options.json))
    return OK


def _waits(what: str) -> None:
    print(f"waits for {what}", file=sys.stderr, flush=True)


def _size(text: str) -> int:
    from argparse import ArgumentTypeError

    from edgebuild.units import size

    try:
        return size(text)
    except ValueError as error:
        raise ArgumentTypeError(f"must be {error}, not {text}") from error


def _number(text: str) -> int:
    from argparse import ArgumentTypeError

    if not text.isdecimal():
        raise ArgumentTypeError(f"must be a number, 0 or more, not {text}")
    return int(text)


def _target_or_store(parser: "ArgumentParser") -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("target", metavar="TARGET", nargs="?", help="rebuild this target apart and compare")
    which.add_argument("--store", action="store_true", help="hash every object again and check every record")


def _what_to_keep(parser: "ArgumentParser") -> None:
    parser.add_argument("--keep-last", metavar="N", type=_number, default=0, help="keep the N newest results of every step too")
    parser.add_argument(
        "--max-size", metavar="SIZE", type=_size, help="keep what nobody needs too, newest first, while all fits in 20GB"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    parser.add_argument("--forget", metavar="DIR", help="do without a project that cannot be seen; '*' stands for any text")


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
    ),
    "doctor": Command(
        about="say what there is to work with here: backends, each tried; machine, disks, accelerators",
        example="edgebuild doctor --json",
        takes=lambda parser: _json(parser),
        run=_doctor,
        project=False,
    ),
    "toolchain": Command(
        about="make, show or remove the environments that backends run in where this Python has not their packages",
        example="edgebuild toolchain install onnxruntime\n  edgebuild toolchain list",
        takes=_toolchains,
        run=_toolchain,
        project=False,
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


def _command(name: str, command: Command, words: list[str]) -> int:
    try:
        options = _parser(name, command).parse_args(words)
    except SystemExit as stop:  # argparse has said why
        return USAGE if stop.code else OK
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


def _doit(words: list[str]) -> int:
    from doit.doit_cmd import DoitMain

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
