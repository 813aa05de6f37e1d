"""The `edgebuild` command: its own few words, and everything else handed to doit. A no-op is answered without doit."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebuild.errors import FAULT, OK, USAGE, EdgebuildError, UserError, did_you_mean

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
    if words and (command := COMMANDS.get(words[0])):
        return _command(words[0], command, words[1:])
    strict = words[:1] == ["--strict"]
    words = words[1:] if strict else words
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


def _one_target(parser: "ArgumentParser") -> None:
    parser.add_argument("target", metavar="TARGET", help="a target's name")


def _one_target_or_json(parser: "ArgumentParser") -> None:
    _one_target(parser)
    _json(parser)


def _json(parser: "ArgumentParser") -> None:
    parser.add_argument("--json", action="store_true", help="for programs; schemas/ says what it holds")


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
}


def _help() -> str:
    rows = "".join(f"  edgebuild {name:<14} {command.about}\n" for name, command in COMMANDS.items())
    return f"""edgebuild: a model compiler for the edge

  edgebuild                build every default target (as `doit` alone)
  edgebuild build:NAME     build one target; any other words go to doit too
  edgebuild list           the targets, with their descriptions
{rows}
options before any words: --strict (an INCONCLUSIVE gate fails), --help, --version
`edgebuild COMMAND --help` shows an example; `edgebuild help` is doit's own help.
"""


def _command(name: str, command: Command, words: list[str]) -> int:
    from argparse import ArgumentParser, RawDescriptionHelpFormatter

    parser = ArgumentParser(
        prog=f"edgebuild {name}",
        description=command.about[0].upper() + command.about[1:] + ".",
        epilog=f"example:\n  {command.example}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.takes(parser)
    try:
        options = parser.parse_args(words)
    except SystemExit as stop:  # argparse has said why
        return USAGE if stop.code else OK
    if command.project:
        _enter_project()
    return command.run(options)


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
    """Whether all is fresh and nothing that says so has moved; then says it, as a run through doit would."""
    from edgebuild.noop import identity, recall

    steps = recall(identity(strict=strict))
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
    """Go to the nearest folder above that has a `dodo.py` beside `targets/`."""
    here = os.getcwd()
    while not (os.path.isfile(os.path.join(here, "dodo.py")) and os.path.isdir(os.path.join(here, "targets"))):
        above = os.path.dirname(here)
        if above == here:
            raise UserError("no project here: a project has dodo.py and targets/; go to one, or make one: edgebuild init DIR")
        here = above
    os.chdir(here)
