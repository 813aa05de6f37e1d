"""The `edgebuild` command: its own few words, and everything else handed to doit. A no-op is answered without doit."""

import os
import sys
import time

from edgebuild.errors import FAULT, OK, USAGE, EdgebuildError, UserError, did_you_mean

COMMANDS = {
    "init": "make DIR and a working project in it",
    "explain": "say for each step of a target: fresh, stale, restorable or waiting, and why",
}
HELP = """edgebuild: a model compiler for the edge

  edgebuild                       build every default target (as `doit` alone)
  edgebuild build:NAME            build one target; any other words go to doit too
  edgebuild list                  the targets, with their descriptions
  edgebuild explain NAME          why each step would or would not run
  edgebuild init DIR              make a project

options before any words: --strict (an INCONCLUSIVE gate fails), --help, --version
`edgebuild COMMAND --help` shows an example; `edgebuild help` is doit's own help.
"""


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
        print(HELP, end="")
        return OK
    if words[:1] == ["init"]:
        return _init(words[1:])
    strict = words[:1] == ["--strict"]
    words = words[1:] if strict else words
    _enter_project()
    if words[:1] == ["explain"]:
        return _explain(words[1:])
    if not words and _nothing_to_do(strict, start):
        return OK
    return _doit([*words, *(["strict=1"] if strict else [])])


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


def _init(words: list[str]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        print(
            "usage: edgebuild init DIR\n\nMakes DIR with dodo.py, targets/ and a small model that builds at once.\n\nexample:\n  edgebuild init digits && cd digits && doit"
        )
        return OK if words[:1] in (["--help"], ["-h"]) else USAGE
    from edgebuild.init import init

    print(init(words[0]))
    return OK


def _explain(words: list[str]) -> int:
    as_json = "--json" in words
    names = [word for word in words if word != "--json"]
    if len(names) != 1 or names[0].startswith("-"):
        print(
            "usage: edgebuild explain TARGET [--json]\n\nSays for each step whether it would run, and which part of its key differs, old → new.\n\nexample:\n  edgebuild explain web-digits"
        )
        return OK if names[:1] in (["--help"], ["-h"]) else USAGE
    from edgebuild.explain import explain, show
    from edgebuild.project import Project

    project = Project()
    name = names[0].removeprefix("build:")
    if name in project.problems:
        raise UserError(project.problems[name])
    if name not in project.targets:
        raise UserError(
            f'there is no target "{name}"; there are: {", ".join(project.names())}.{did_you_mean(name, project.names())}'
        )
    states = explain(project, name)
    print(show(states, as_json))
    project.memo.save()
    return OK
