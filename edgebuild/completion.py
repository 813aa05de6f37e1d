"""`edgebuild completion SHELL`: a script for the shell, which asks `edgebuild completion --words` for every word it completes.

It asks for commands, their options, and tasks such as `build:NAME`. argcomplete would know the options alone: most words are
doit's. Names come from the plan cache and from targets/, never from YAML: an answer must be quick.
"""

import json
import os
from argparse import ArgumentParser
from collections.abc import Iterable

from edgebuild.files import unsealed
from edgebuild.noop import STATE
from edgebuild.step import VERBS
from edgebuild.units import name_problem

DOIT = ("run", "list", "info", "clean", "forget", "help")  # doit's own commands that take tasks, and help
OPTIONS = ("--strict", "--offline", "--help", "--version")

# bash breaks words at ":" (COMP_WORDBREAKS), so the word is read from the line, and what stands before its last ":" is cut
# off the answers. readline's own file names follow where there is none.
BASH = """_edgebuild() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$' \\t\\n'
    local -a words=($line)
    local current=${line##*[[:space:]]}
    [[ -n $current ]] && unset 'words[-1]'
    IFS=$'\\n'
    COMPREPLY=($("$1" completion --words "$current" "${words[@]:1}" 2>/dev/null))
    [[ $COMP_WORDBREAKS == *:* && $current == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%:*}:"}")
    return 0
}
complete -o default -F _edgebuild edgebuild
"""
ZSH = """#compdef edgebuild
_edgebuild() {
    local -a found
    found=("${(@f)$("$words[1]" completion --words "$PREFIX" "${(@)words[2,CURRENT-1]}" 2>/dev/null)}")
    if [[ -n $found[1] ]]; then compadd -- "${found[@]}"; else _files; fi
}
if [[ $funcstack[1] == _edgebuild ]]; then _edgebuild "$@"; else compdef _edgebuild edgebuild; fi
"""
FISH = """function __edgebuild_words
    set -l before (commandline -opc)
    set -l program $before[1]
    set -e before[1]
    set -l current (commandline -ct)
    $program completion --words "$current" $before 2>/dev/null
end
complete -c edgebuild -a '(__edgebuild_words)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def words(current: str, before: list[str], commands: Iterable[str], parser: ArgumentParser | None) -> list[str]:
    """What may stand for the word `current` behind the words `before`, in the project's root.

    `commands`: edgebuild's own; `parser`: of the one that the words begin with.
    """
    if parser:
        found = _arguments(parser)
    else:
        tasks = [f"{verb}:{name}" for name in names() for verb in ("build", *VERBS) if verb not in ("reference", "choose")]
        tasks += _planned()
        found = tasks if any(word not in OPTIONS for word in before) else [*OPTIONS, *commands, *DOIT, *tasks]
    return sorted({word for word in found if word.startswith(current) and word not in before})


def _arguments(parser: ArgumentParser) -> list[str]:
    found: list[str] = []
    for action in parser._actions:  # argparse has no public way to list them
        found += action.option_strings
        if action.metavar == "TARGET":
            found += names()
        elif action.choices:
            found += map(str, action.choices)
    return found


def _planned() -> set[str]:
    """The tasks of the last plan that not every target has: of those that try several recipes, and of models."""
    try:
        with open(f"{STATE}/plan.json", "rb") as file:
            return {str(step[0]) for step in json.loads(unsealed(file.read()))["steps"] if step[1] in ("choose", "agree")}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return set()


def names() -> list[str]:
    """The targets: those of the last plan; where a target file is younger than that, by file names too.

    What cannot be a target's name is never put on somebody's command line: `$(…)`, blanks, what a terminal obeys.
    """
    files = {name.removesuffix(".yaml"): f"targets/{name}" for name in _listdir("targets") if name.endswith(".yaml")}
    files = {name: path for name, path in files.items() if not name_problem(name)}
    try:
        with open(f"{STATE}/plan.json", "rb") as file:
            cached = json.loads(unsealed(file.read()))
        planned = {name for name in map(str, (*cached["targets"], *cached["problems"])) if not name_problem(name)}
        made = os.stat(f"{STATE}/plan.json").st_mtime
        young = {name for name, path in files.items() if os.stat(path).st_mtime > made}
    except (OSError, ValueError, KeyError, TypeError):
        return sorted(files)
    return sorted(planned | young)


def _listdir(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
